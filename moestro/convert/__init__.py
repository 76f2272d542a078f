"""Floor 8: dense models turned into mixtures of experts, and back."""
