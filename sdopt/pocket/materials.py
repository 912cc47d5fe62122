"""What pocket's world is made of: colours, skies, grounds, and the noise that gives them grain."""

import torch

ALBEDO = {  # linear light
    "red": (0.80, 0.03, 0.03),
    "orange": (0.95, 0.27, 0.01),
    "yellow": (0.95, 0.74, 0.03),
    "green": (0.06, 0.48, 0.07),
    "cyan": (0.04, 0.66, 0.70),
    "blue": (0.03, 0.09, 0.75),
    "purple": (0.34, 0.05, 0.55),
    "white": (0.88, 0.88, 0.86),
}
# of a sky: (zenith, horizon, light colour, ambient colour, light elevation in degrees)
SKY = {
    "day": ((0.10, 0.30, 0.75), (0.62, 0.78, 0.92), (2.30, 2.15, 1.90), (0.42, 0.50, 0.62), (40, 62)),
    "sunset": ((0.16, 0.13, 0.36), (1.00, 0.42, 0.14), (2.30, 1.40, 0.80), (0.44, 0.34, 0.42), (20, 30)),
    "night": ((0.006, 0.010, 0.035), (0.03, 0.05, 0.14), (0.62, 0.72, 0.98), (0.13, 0.16, 0.28), (38, 60)),
}


def hashed(i, j, seed):
    """A uniform number in [0, 1) for every lattice point, the same on every device (integers only)."""
    h = (i * 374761393 + j * 668265263 + seed * 2147483647) & 0xFFFFFFFF
    h = ((h ^ (h >> 13)) * 1274126177) & 0xFFFFFFFF
    h = ((h ^ (h >> 16)) * 2246822519) & 0xFFFFFFFF
    return ((h ^ (h >> 15)) & 0xFFFF).float() / 65536


def noise(x, y, seed):
    """Value noise: hashed lattice points, smoothly interpolated, in [0, 1]."""
    i, j = torch.floor(x), torch.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    i, j = i.long(), j.long()
    low = torch.lerp(hashed(i, j, seed), hashed(i + 1, j, seed), u)
    high = torch.lerp(hashed(i, j + 1, seed), hashed(i + 1, j + 1, seed), u)
    return torch.lerp(low, high, v)


def sky_colour(dx, dy, dz, look):
    """Gradient from horizon to zenith, clouds by day and at sunset, stars by night."""
    height = dy.clamp(min=0)[:, None]
    base = torch.lerp(look["horizon"], look["zenith"], 1 - torch.exp(-5 * height))
    u, v = dx / (dy.clamp(min=0) + 0.12), dz / (dy.clamp(min=0) + 0.12)
    seed = look["seed"]
    cloud = 0.6 * noise(u * 0.9, v * 0.9, seed) + 0.4 * noise(u * 2.1, v * 2.1, seed + 1)
    cloud = ((cloud - 0.5) * 2.6).clamp(0, 1) * look["cloud"]
    base = torch.lerp(base, look["cloud_colour"], 0.75 * cloud[:, None])
    su, sv = torch.atan2(dx, dz) * 34, dy * 34
    i, j = torch.floor(su), torch.floor(sv)
    centre_u = 0.25 + 0.5 * hashed(i.long(), j.long(), seed + 2)
    centre_v = 0.25 + 0.5 * hashed(i.long(), j.long(), seed + 3)
    bright = (hashed(i.long(), j.long(), seed + 4) - 0.72).clamp(min=0) * 3.4
    star = torch.exp(-(((su - i - centre_u) ** 2 + (sv - j - centre_v) ** 2) * 90)) * bright * look["stars"]
    return base + star[:, None]


def ground_colour(x, z, far, look):
    """Tiles, planks or sand: albedo [N, 3]. Patterns fade with distance, where they would only shimmer."""
    seed, ground = look["seed"], look["ground"]
    cos, sin = torch.cos(look["turn"]), torch.sin(look["turn"])
    u, v = x * cos - z * sin + look["turn"] * 7, x * sin + z * cos
    fade = torch.exp(-0.045 * far)
    i, j = torch.floor(u / 0.9).long(), torch.floor(v / 0.9).long()
    dark = ((i + j) % 2).float()
    joint = torch.minimum(
        (u / 0.9 - i).abs().minimum((1 + i - u / 0.9).abs()), (v / 0.9 - j).abs().minimum((1 + j - v / 0.9).abs())
    )
    tile = 0.36 - 0.17 * dark * fade + 0.05 * (hashed(i, j, seed) - 0.5) - 0.10 * fade * (joint < 0.025).float()
    tiles = tile[:, None] * torch.tensor([1.0, 0.98, 0.94], device=x.device)
    row = torch.floor(v / 0.55).long()
    shift = hashed(row, row, seed) * 3
    plank = torch.floor((u + shift) / 2.6).long()
    tone = hashed(plank, row, seed + 1)
    grain = noise(u * 1.3 + 9 * tone, v * 15, seed + 2)
    seam = ((v / 0.55 - row) < 0.05).float() + (((u + shift) / 2.6 - plank) < 0.012).float()
    planks = (0.62 + 0.30 * tone + 0.24 * fade * (grain - 0.5) - 0.30 * fade * seam.clamp(max=1))[:, None]
    planks = planks * torch.tensor([0.42, 0.23, 0.11], device=x.device)
    ripple = torch.sin(u * 7 + 5 * noise(u * 0.8, v * 0.8, seed + 3))
    grains = noise(u * 9, v * 9, seed + 4) - 0.5
    sand = (1 + 0.10 * fade * ripple + 0.16 * fade * grains)[:, None] * torch.tensor(
        [0.50, 0.40, 0.26], device=x.device
    )
    ground = ground[:, None]
    return torch.where(ground == 0, tiles, torch.where(ground == 1, planks, sand))
