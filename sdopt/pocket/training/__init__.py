"""How pocket was made: `python -m sdopt.pocket.training STAGE`. Nothing else in sdopt imports this package."""
