"""Draws scenes by sphere tracing, in torch, on a CPU or a GPU.

Every pixel is a ray, every quantity a flat tensor over rays. Solids are found by sphere tracing their distance
functions (Hart 1996; the functions are Inigo Quilez's, https://iquilezles.org/articles/distfunctions); the ground is
met analytically. Only rays that pass near a solid are traced. On a GPU the arithmetic can be compiled into a few kernels.
"""

import math
from functools import cache

import torch

from sdopt.pocket.materials import ALBEDO, SKY, ground_colour, noise, sky_colour
from sdopt.pocket.scenes import (
    CAMERA,
    FINISHES,
    GROUNDS,
    PITCH,
    SHAPES,
    TAN_HALF_FOV,
    Scene,
)

FAR = 1e4


def length(*xs):
    return torch.sqrt(sum(x * x for x in xs) + 1e-12)


def distance(x, y, z, things):
    """Signed distance from points [N] to the nearest thing, and which thing it is. `things`: [N, 3] a property."""
    best, which = torch.full_like(x, FAR), torch.zeros_like(x, dtype=torch.long)
    for k in range(3):
        shape, s = things["shape"][:, k], things["scale"][:, k]
        rx, qy, rz = (x - things["x"][:, k]) / s, (y - things["y"][:, k]) / s, (z - things["z"][:, k]) / s
        cos, sin = things["cos"][:, k], things["sin"][:, k]
        qx, qz = rx * cos - rz * sin, rx * sin + rz * cos
        radial = length(qx, qz)
        sphere = length(qx, qy, qz) - 0.92
        bx, by, bz = qx.abs() - 0.77, qy.abs() - 0.77, qz.abs() - 0.77
        cube = (
            length(bx.clamp(min=0), by.clamp(min=0), bz.clamp(min=0))
            + torch.maximum(torch.maximum(bx, by), bz).clamp(max=0)
            - 0.07
        )
        cx, cy = radial - 0.67, qy.abs() - 0.83
        cylinder = length(cx.clamp(min=0), cy.clamp(min=0)) + torch.maximum(cx, cy).clamp(max=0) - 0.07
        # a cone of half-height 0.9 and base radius 0.8, rounded by 0.06: distance to its slanted side and to its base
        side_x, side_y = 0.8, -1.8  # from the apex down the side
        px, py = radial, qy - 0.9
        t = ((px * side_x + py * side_y) / (side_x**2 + side_y**2)).clamp(0, 1)
        on_side = length(px - side_x * t, py - side_y * t)
        on_base = length(radial - radial.clamp(max=0.8), qy + 0.9)
        inside = (qy > -0.9) & (px * 1.8 + py * 0.8 < 0)
        cone = torch.minimum(on_side, on_base) * torch.where(inside, -1.0, 1.0) - 0.06
        torus = length(length(qx, qy) - 0.68, qz) - 0.28
        d = torch.where(
            shape == 0,
            sphere,
            torch.where(shape == 1, cube, torch.where(shape == 2, cylinder, torch.where(shape == 3, cone, torus))),
        )
        d = torch.where(shape < 0, FAR, d * s)
        which = torch.where(d < best, k, which)
        best = torch.minimum(best, d)
    return best, which


def _advance(t, ox, oy, oz, dx, dy, dz, things):
    d, _ = distance(ox + t * dx, oy + t * dy, oz + t * dz, things)
    return torch.where((d < 2e-4 * t) | (t > 60), t, t + d)


def _advance_shadow(t, light, ox, oy, oz, dx, dy, dz, things):
    """A soft shadow is the narrowest cone of light that passes beside the solids (Quilez, rmshadows)."""
    d, _ = distance(ox + t * dx, oy + t * dy, oz + t * dz, things)
    return t + d.clamp(0.02, 0.35), torch.minimum(light, (9 * d / t).clamp(0, 1))


def _bounds(ox, oy, oz, dx, dy, dz, things):
    """Where rays enter the first bounding sphere; FAR for those that meet none."""
    near = torch.full_like(dx, FAR)
    for k in range(3):
        cx, cy, cz = things["x"][:, k] - ox, things["y"][:, k] - oy, things["z"][:, k] - oz
        r = 1.45 * things["scale"][:, k]
        along = cx * dx + cy * dy + cz * dz
        miss = cx * cx + cy * cy + cz * cz - along * along - r * r
        hit = (miss < 0) & (along + r > 0) & (things["shape"][:, k] >= 0)
        near = torch.where(hit, torch.minimum(near, (along - torch.sqrt((-miss).clamp(min=0))).clamp(min=0.02)), near)
    return near


def _normal(x, y, z, things):
    """Gradient of the distance by four taps on a tetrahedron."""
    e = 1e-3
    taps = [
        ((a, b, c), distance(x + e * a, y + e * b, z + e * c, things)[0])
        for a, b, c in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1))
    ]
    n = [sum(k[axis] * d for k, d in taps) for axis in range(3)]
    size = length(*n)
    return [c / size for c in n]


def _shade_things(x, y, z, dx, dy, dz, nx, ny, nz, which, lit, things, look):
    pick = lambda v: torch.gather(v, 1, which[:, None])[:, 0]
    albedo = torch.gather(things["albedo"], 1, which[:, None, None].expand(-1, 1, 3))[:, 0]
    shiny = pick(things["shiny"])[:, None]
    lx, ly, lz = look["light"].unbind(1)
    # matte is chalk: speckled. The pattern is fixed to the thing, not to the picture.
    px, py, pz = x - pick(things["x"]), y - pick(things["y"]), z - pick(things["z"])
    speckle = noise(px * 24 + py * 17, pz * 24 - py * 21, look["seed"] + 5)[:, None]
    albedo = albedo * torch.where(shiny > 0, 1.0, 0.86 + 0.28 * speckle)
    diffuse = (nx * lx + ny * ly + nz * lz).clamp(min=0)[:, None] * lit[:, None]
    open_sky = torch.ones_like(x)
    for step in (
        0.12,
        0.3,
    ):  # ambient occlusion: how much nearer than `step` is anything along the normal, ground included
        d = torch.minimum(distance(x + nx * step, y + ny * step, z + nz * step, things)[0], y + ny * step)
        open_sky = open_sky * (1 - 0.45 * (1 - d / step).clamp(0, 1))
    ambient = look["ambient"] * (0.75 + 0.45 * ny[:, None]) * open_sky[:, None]
    colour = albedo * (look["sun"] * diffuse + ambient)
    along = dx * nx + dy * ny + dz * nz
    rx, ry, rz = dx - 2 * along * nx, dy - 2 * along * ny, dz - 2 * along * nz
    mirrored = torch.where(
        ry[:, None] > 0, sky_colour(rx, ry, rz, look) * open_sky[:, None], 0.3 * look["ambient"] + 0.1 * look["sun"]
    )
    fresnel = (0.10 + 0.90 * (1 + along).clamp(0, 1) ** 5)[:, None]
    highlight = (rx * lx + ry * ly + rz * lz).clamp(min=0)[:, None]
    highlight = (1.6 * highlight**90 + 0.25 * highlight**14) * look["sun"] * lit[:, None]
    return torch.where(shiny > 0, colour * 0.9 * (1 - fresnel) + mirrored * fresnel + highlight, colour)


def _shade_ground(x, z, far, lit, things, look):
    albedo = ground_colour(x, z, far, look)
    contact = (distance(x, torch.full_like(x, 0.05), z, things)[0] / 0.35).clamp(0, 1)
    ambient = look["ambient"] * (0.55 + 0.45 * contact)[:, None]
    colour = albedo * (look["sun"] * (look["light"][:, 1] * lit)[:, None] + ambient)
    haze = (1 - torch.exp(-0.00035 * far * far))[:, None]
    return torch.lerp(colour, look["horizon"] * 0.85, haze)


@cache
def _kernels(compiled: bool):
    functions = dict(
        advance=_advance,
        shadow=_advance_shadow,
        bounds=_bounds,
        things=_shade_things,
        ground=_shade_ground,
        sky=sky_colour,
        which=distance,
        normal=_normal,
    )
    if not compiled:
        return functions
    return {name: torch.compile(f, dynamic=True) for name, f in functions.items()}


def _tensors(scenes: list[Scene], device):
    """Scenes as tensors: `things` [B, 3] a property (absent things have shape -1), `look` [B] or [B, 3] a property."""
    things = {k: torch.zeros(len(scenes), 3) for k in ("x", "y", "z", "scale", "cos", "sin", "shiny")}
    things |= {"shape": torch.full((len(scenes), 3), -1), "albedo": torch.zeros(len(scenes), 3, 3)}
    things["scale"] += 1  # nothing divides by the scale of an absent thing
    looks = []
    for b, scene in enumerate(scenes):
        for k, t in enumerate(scene.things):
            centre = t.centre
            values = dict(
                x=centre[0],
                y=centre[1],
                z=centre[2],
                scale=t.scale,
                cos=math.cos(t.yaw),
                sin=math.sin(t.yaw),
                shiny=FINISHES.index(t.finish),
                shape=SHAPES.index(t.shape),
            )
            for name, value in values.items():
                things[name][b, k] = value
            things["albedo"][b, k] = torch.tensor(ALBEDO[t.colour])
        zenith, horizon, sun, ambient, (low, high) = SKY[scene.sky]
        generator = torch.Generator().manual_seed(scene.seed)
        turn, cloud, azimuth, elevation, seed = torch.rand(5, generator=generator).tolist()
        azimuth = (azimuth - 0.5) * 2.2  # the light comes over the camera's shoulder, left or right
        azimuth += math.copysign(0.35, azimuth)
        elevation = math.radians(low + (high - low) * elevation)
        light = (math.sin(azimuth) * math.cos(elevation), math.sin(elevation), -math.cos(azimuth) * math.cos(elevation))
        look = dict(
            zenith=zenith,
            horizon=horizon,
            sun=sun,
            ambient=ambient,
            light=light,
            stars=float(scene.sky == "night"),
            cloud=0.0 if scene.sky == "night" else 0.4 + 0.6 * cloud,
            cloud_colour=(0.95, 0.95, 0.95) if scene.sky == "day" else (0.75, 0.25, 0.22),
            ground=GROUNDS.index(scene.ground),
            turn=turn * 1.5,
            seed=int(seed * 1e6),
        )
        looks.append(look)
    look = {k: torch.tensor([row[k] for row in looks], device=device) for k in looks[0]}
    return {k: v.to(device) for k, v in things.items()}, look


def _rays(size: int, device):
    """Directions of the camera's rays, [size * size] each of x, y, z, row by row from the top left."""
    p = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
    v, u = torch.meshgrid(p * TAN_HALF_FOV, p * TAN_HALF_FOV, indexing="ij")
    dx, dy, dz = u, -v * math.cos(PITCH) - math.sin(PITCH), math.cos(PITCH) - v * math.sin(PITCH)
    norm = length(dx, dy, dz)
    return [(c / norm).flatten() for c in (dx, dy, dz)]


@torch.no_grad()
def render(
    scenes: list[Scene], size: int = 256, device: str | torch.device = "cpu", samples: int = 2, compiled: bool | None = None
) -> torch.Tensor:
    """Draw scenes: uint8 [N, 3, size, size] in sRGB on `device`; `samples` squared rays are averaged a pixel.

    `compiled`: whether torch.compile makes its arithmetic a few kernels, which takes a minute or two once and pays from
    tens of thousands of pictures on; None: on a GPU.
    Source: sphere tracing (Hart 1996) with soft shadows and ambient occlusion after Quilez.
    Introduced in notebooks/14_is_it_still_the_same_picture.
    """
    device = torch.device(device)
    kernel = _kernels(device.type == "cuda" if compiled is None else compiled)
    things, look = _tensors(scenes, device)
    n, rays = len(scenes), (size * samples) ** 2
    scene = torch.arange(n, device=device).repeat_interleave(rays)
    dx, dy, dz = (d.repeat(n) for d in _rays(size * samples, device))
    of = lambda table, index: {k: v[scene[index]] for k, v in table.items()}

    def near_things(index, ox, oy, oz, dx, dy, dz):
        """Where the rays `index` first come near a thing, FAR where never; which do, and their origins, ways, things."""
        t = kernel["bounds"](ox, oy, oz, dx, dy, dz, of(things, index))
        some = (t < FAR).nonzero()[:, 0]
        o, d, near = [c[some] for c in (ox, oy, oz)], [c[some] for c in (dx, dy, dz)], of(things, index[some])
        return t, some, o, d, near

    everything = torch.arange(n * rays, device=device)
    ox, oy, oz = (torch.full_like(dx, c) for c in CAMERA)
    t, some, o, d, near = near_things(everything, ox, oy, oz, dx, dy, dz)
    reached = t[some]
    for _ in range(48):
        reached = kernel["advance"](reached, *o, *d, near)
    gap, _ = kernel["which"](*(a + reached * b for a, b in zip(o, d)), near)
    t[some] = torch.where(gap < 0.004, reached, FAR)
    ground = torch.where(dy < -1e-4, -CAMERA[1] / dy.clamp(max=-1e-4), FAR)

    def lit(index, x, y, z):
        """Share of the light that reaches points, 0 to 1."""
        lx, ly, lz = look["light"][scene[index]].unbind(1)
        _, some, o, d, near = near_things(index, x, y, z, lx, ly, lz)
        step, share = torch.full_like(o[0], 0.03), torch.ones_like(o[0])
        for _ in range(26):
            step, share = kernel["shadow"](step, share, *o, *d, near)
        out = torch.ones_like(x)
        out[some] = share
        return out

    picture = torch.empty(n * rays, 3, device=device)
    sky = ((t >= FAR) & (ground >= FAR)).nonzero()[:, 0]
    picture[sky] = kernel["sky"](dx[sky], dy[sky], dz[sky], of(look, sky))
    floor = (ground < t).nonzero()[:, 0]
    x, z = CAMERA[0] + ground[floor] * dx[floor], CAMERA[2] + ground[floor] * dz[floor]
    picture[floor] = kernel["ground"](
        x, z, ground[floor], lit(floor, x, torch.full_like(x, 1e-3), z), of(things, floor), of(look, floor)
    )
    solid = ((t < FAR) & (t <= ground)).nonzero()[:, 0]
    d = [c[solid] for c in (dx, dy, dz)]
    x, y, z = (a + t[solid] * b for a, b in zip(CAMERA, d))
    own = of(things, solid)
    _, which = kernel["which"](x, y, z, own)
    normal = kernel["normal"](x, y, z, own)
    light = lit(solid, *(c + 0.02 * n for c, n in zip((x, y, z), normal)))
    picture[solid] = kernel["things"](x, y, z, *d, *normal, which, light, own, of(look, solid))

    picture = picture * (1 + picture / 6) / (1 + picture)  # Reinhard's curve keeps highlights from clipping
    picture = (1.25 * picture).clamp(0, 1) ** (1 / 2.2)
    picture = picture.view(n, size, samples, size, samples, 3).mean((2, 4))
    return (picture.permute(0, 3, 1, 2) * 255 + 0.5).to(torch.uint8).contiguous()
