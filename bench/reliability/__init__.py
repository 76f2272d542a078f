"""What happens when things go wrong, counted: kills, damage, bad input, memory, hours of training."""
