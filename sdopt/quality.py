"""Does it still look right? Drift between pictures, whether they show what was asked for, how far they are from renders."""

import torch
from torch.nn.functional import cosine_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from sdopt.errors import UserError
from sdopt.intervals import resampled, share
from sdopt.pocket.oracle import load_oracle, to_pixels

PIECE = 64  # pictures that are compared at once
CEILING_DB = 100.0  # about one value of a whole picture off by one level
HALVINGS = 10


def drift(images, reference):
    """How far `images` are from `reference`: {"exact", "max_abs", "psnr_db"}.

    Both: one PIL image or a list of them, the same number and size. `max_abs` is in levels of 0 to 255; `psnr_db` is
    over all pixels together, in dB, and None when exact (it would be infinite). Raises UserError when shapes differ, and
    for none at all.
    Introduced in notebooks/02_bf16.
    """
    some, others = (x if isinstance(x, (list, tuple)) else [x] for x in (images, reference))
    if any(len({image.size for image in pictures}) != 1 for pictures in (some, others)):
        raise UserError("cannot compare images of no size or of several: give pictures of one")
    a, b = to_pixels(some), to_pixels(others)
    _check_alike(a, b)
    exact = bool(torch.equal(a, b))
    return {
        "exact": exact,
        "max_abs": int((a.int() - b.int()).abs().max()),
        "psnr_db": None if exact else peak_signal_noise_ratio(a.float(), b.float(), data_range=255.0).item(),
    }


def psnr_db(images, reference):
    """The PSNR of every picture of uint8 [N, 3, H, W] against that of `reference`: float32 [N], in dB, inf where equal.

    Raises UserError when shapes differ. Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    _check_alike(images, reference)
    over = {"data_range": 255.0, "dim": (1, 2, 3), "reduction": "none"}
    pairs = zip(images.split(PIECE), reference.split(PIECE), strict=True)
    return torch.cat([peak_signal_noise_ratio(a.float(), b.float(), **over).reshape(-1) for a, b in pairs])


def paired(images, latents, reference, reference_latents):
    """How far each picture is from its own in `reference`, both drawn from the same noise: {"psnr_db", "ssim", "p99",
    "latent_cosine"}, a list of one number a picture each.

    Pictures: uint8 [N, 3, H, W]; latents, what the VAE was given for them: [N, 4, h, w], of any scale. `psnr_db` ends at
    CEILING_DB, so that equal pictures have a number, too; `ssim` is up to 1; `p99`: 99 % of the picture's values are no
    further off than this, in levels of 0 to 255; `latent_cosine` is up to 1. Pictures smaller than SSIM's window, 11
    pixels, and other shapes are refused with a UserError.
    Source: Wang et al. 2004 (SSIM), as torchmetrics has it. Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    if images.shape != reference.shape or min(images.shape[-2:]) < 11:
        raise UserError(
            f"cannot compare images of shape {list(images.shape)} with {list(reference.shape)}: draw them alike, "
            "11 pixels or more"
        )
    _check_alike(latents, reference_latents, "latents")
    if len(images) != len(latents):
        raise UserError(f"{len(images)} pictures cannot be compared with {len(latents)} latents: give one a picture")
    pieces = zip(images.split(PIECE), reference.split(PIECE), strict=True)
    ssim, p99 = [], []
    for a, b in pieces:
        ssim.append(structural_similarity_index_measure(a / 255.0, b / 255.0, data_range=1.0, reduction="none"))
        off = (a.short() - b.short()).abs().flatten(1)
        p99.append(off.kthvalue(-(-99 * off.shape[1] // 100)).values)
    cosine = cosine_similarity(latents.double().flatten(1), reference_latents.double().flatten(1))
    return {
        "psnr_db": psnr_db(images, reference).clamp(max=CEILING_DB).tolist(),
        "ssim": torch.cat(ssim).reshape(-1).tolist(),
        "p99": torch.cat(p99).tolist(),
        "latent_cosine": cosine.tolist(),
    }


def _check_alike(a, b, what="images"):
    if a.shape != b.shape:
        raise UserError(f"cannot compare {what} of shape {list(a.shape)} with {list(b.shape)}: draw them alike")


def seen(scenes, images):
    """What the oracle finds in pocket's pictures of what their prompts asked for: `adherence` of all of them.

    `scenes`: (text, scene) a picture; `images`: PIL images, in the same order. Introduced in
    notebooks/00_measure_first.
    """
    return adherence(agreements(scenes, images))


def agreements(scenes, images):
    """The oracle's reading of every picture held against what its prompt asked for: a list of `scenes.Agreement`.

    `scenes`: (text, scene) a picture; `images`: PIL images or uint8 [N, 3, H, W], in the same order.
    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    readings = load_oracle().read(images)
    return [scene.compare(r, text) for (text, scene), r in zip(scenes, readings, strict=True)]


def adherence(agreements, resamples=1000, seed=0):
    """What share of what the prompts said is in the pictures, with 95 % intervals.

    `agreements`: one a picture, each with `objects` and `relations`, tuples of bool (`scene.compare(reading)`).
    Returns {"objects", "relations", "prompts_all_right"}, each {"value", "low", "high", "n"}, shares from 0 to 1; n
    counts objects, relations, prompts; a share of nothing is None. Objects are counted one by one, but those of one
    prompt stand or fall together, so whole prompts are resampled (cluster bootstrap; Efron and Tibshirani 1993).
    Introduced in notebooks/00_measure_first.
    """
    everything = [agreement.objects + agreement.relations for agreement in agreements]
    return {
        "objects": share([agreement.objects for agreement in agreements], resamples, seed),
        "relations": share([agreement.relations for agreement in agreements], resamples, seed),
        "prompts_all_right": share([(all(facts),) for facts in everything if facts], resamples, seed),
    }


def frechet(features, real, resamples=200, seed=0):
    """Frechet distance of pictures to real renders, in the oracle's features: {"value", "low", "high", "n", "bias"}.

    `features`, `real`: [N, D] and [N, D], of the pictures and of the renders of the same N prompts, in the same order.
    Two normal distributions with the two sets' means m and covariances S are |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))
    apart; 0 for the same set, in the features' units squared. From N pictures it comes out too large, by an amount that
    goes as 1/N: `bias` is an estimate of it, by how much larger the distance is between halves of both sets. Compare
    distances of the same N only, or take the bias off. `low` and `high` say how far the value moves with other prompts
    (95 %, prompts resampled, the renders as they are; resampling has a bias of its own, which is taken off).
    Raises UserError for fewer than 4 prompts. Source: Heusel et al., https://arxiv.org/abs/1706.08500; the bias: Chong and
    Forsyth, https://arxiv.org/abs/1911.07023. Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    features, real = features.double(), real.double()
    n = len(features)
    if features.shape != real.shape or n < 4:
        raise UserError(f"no distance between {list(features.shape)} and {list(real.shape)}: give 4 or more of each")
    towards, everything = _Towards(real), torch.ones(1, n, dtype=torch.float64)
    value = towards.distances(features, everything)[0]
    drawn = towards.distances(features, torch.tensor(resampled(n, resamples, seed)))
    spread = (drawn - drawn.mean()).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = (value + spread).clamp(min=0).tolist()
    shuffle, halves = torch.Generator().manual_seed(seed), []
    for _ in range(HALVINGS):
        order = torch.randperm(n, generator=shuffle).to(features.device)
        for half in (order[: n // 2], order[n // 2 :]):
            halves.append(_Towards(real[half]).distances(features[half], everything[:, : len(half)]))
    bias = torch.cat(halves).mean() - value
    return {"value": value.item(), "low": low, "high": high, "n": n, "bias": bias.item()}


class _Towards:
    """Frechet distances to one set of features, whose covariance's root is taken once.

    Sums over the pictures are taken where the features are, roots on the CPU: hundreds of small matrices.
    """

    def __init__(self, real):
        means, covariances = _moments(real, torch.ones(1, len(real), dtype=torch.float64))
        self.mean, self.spread = means[0], covariances[0].trace()
        squares, directions = torch.linalg.eigh(covariances[0])
        self.root = directions * squares.clamp(min=0).sqrt() @ directions.T

    def distances(self, features, weights):
        """The distance of features [N, D] for each of the weights [K, N], how often each picture counts: [K]."""
        means, covariances = _moments(features, weights)
        # (S1 S2)^(1/2) has the trace of (R S1 R)^(1/2), where R R = S2: symmetric, so its eigenvalues are real
        cross = torch.linalg.eigvalsh(self.root @ covariances @ self.root).clamp(min=0).sqrt().sum(-1)
        spread = covariances.diagonal(dim1=1, dim2=2).sum(-1)
        return ((means - self.mean).square().sum(-1) + spread + self.spread - 2 * cross).clamp(min=0)


def _moments(features, weights):
    """Means [K, D] and covariances [K, D, D] of features [N, D], each counted as often as weights [K, N] say; on the CPU."""
    moments = []
    for one in weights.to(features.device):
        mean = one @ features / one.sum()
        centred = features - mean
        moments.append((mean, centred.T @ (one[:, None] * centred) / (one.sum() - 1)))
    return tuple(torch.stack(parts).cpu() for parts in zip(*moments, strict=True))
