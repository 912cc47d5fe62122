"""pocket: a small text-to-image latent diffusion model, its world of still lifes, and the oracle that reads pictures back."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
PIPELINE = WEIGHTS / "pipeline"
