"""The prompts and seeds all rows of a study share, and what is seen in the pictures drawn from them."""

import hashlib
import io

import numpy as np
from PIL import Image

from sdopt import path, quality, results
from sdopt.pocket.captions import test_prompts

BASELINE = path.STEPS[0].id


class Judge:
    """pocket draws a test prompt and a seed of its own for every picture, and the oracle reads them; the others draw one
    prompt from several seeds. Pictures by random weights are noise and are not judged.

    With a `folder`, pictures are kept there, so that a study that was stopped can compare with those it has drawn.
    """

    def __init__(self, shared, folder=None):
        runs, batch = shared["runs"], shared["batch"]
        self.asked = hashlib.sha256(repr(sorted(shared.items())).encode()).hexdigest()[:12]  # never another study's pictures
        self.scenes, self.folder = None, folder and folder / self.asked
        texts = [shared["prompt"]] * (runs * batch)
        if shared["model"] == "pocket":
            prompts = test_prompts(runs * batch)
            texts, self.scenes = [p.text for p in prompts], [(p.text, p.scene) for p in prompts]
        chunks = [range(run * batch, (run + 1) * batch) for run in range(runs)]
        self.prompts = tuple(tuple(texts[k] for k in chunk) for chunk in chunks)
        self.seeds = tuple(tuple(shared["seed"] + k for k in chunk) for chunk in chunks)
        self.noise = shared["weights"] == "random"
        self.seen = {}

    def judge(self, i, images):
        """The quality of row `i`: what the oracle reads, and the drift from the baseline and from the step before."""
        if self.noise:
            return None
        pictures = self.seen[i] = [Image.fromarray(pixels) for batch in images for pixels in batch]
        self._keep(i, images)
        seen = quality.seen(self.scenes, pictures) if self.scenes else {}
        for name, other in (("against_baseline", BASELINE), ("against_previous", path.step_before(i))):
            drawn = self._drawn(other) if other != i else None
            seen[name] = quality.drift(pictures, drawn) if drawn else None
        return seen

    def _keep(self, i, images):
        if self.folder:
            file = io.BytesIO()
            np.savez_compressed(file, np.concatenate(images))
            results.write_whole(self.folder / f"{i}.npz", file.getvalue())

    def _drawn(self, i):
        kept = self.folder / f"{i}.npz" if self.folder and i else None
        if i not in self.seen and kept and kept.exists():
            self.seen[i] = [Image.fromarray(pixels) for pixels in np.load(kept, allow_pickle=False)["arr_0"]]
        return self.seen.get(i)
