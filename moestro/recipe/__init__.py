"""Floor 9: recipes. YAML files, read strictly and bound to the signatures of the parts they name."""
