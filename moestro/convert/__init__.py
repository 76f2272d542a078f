"""Floor 12: dense models turned into mixtures of experts, and back."""
