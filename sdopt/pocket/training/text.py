"""The text encoder's first lesson: say which things a caption names, and how they stand to each other."""

import torch
import torch.nn.functional as F
from torch import nn

from sdopt.pocket.scenes import COLOURS, RELATIONS, SHAPES, Scene
from sdopt.pocket.training.architecture import TEXT_WIDTH
from sdopt.pocket.training.data import draw_scenes
from sdopt.pocket.training.loop import fit

PAIRS = len(COLOURS) * len(SHAPES)
OPPOSITE = {"left of": "right of", "right of": "left of", "in front of": "behind", "behind": "in front of"}
UNSAID = len(RELATIONS)


def facts(scene: Scene) -> tuple[list[int], list[list[int]]]:
    """The pairs a caption of the scene names, and [first, second, relation] for every two of them, in both orders."""
    pair = [COLOURS.index(t.colour) * len(SHAPES) + SHAPES.index(t.shape) for t in scene.things]
    said = {(a, b): relation for a, relation, b in scene.relations}
    said |= {(b, a): OPPOSITE[relation] for (a, b), relation in list(said.items()) if relation in OPPOSITE}
    both = [(a, b) for a in range(len(pair)) for b in range(len(pair)) if a != b]
    return pair, [[pair[a], pair[b], RELATIONS.index(said[a, b]) if (a, b) in said else UNSAID] for a, b in both]


class Facts(nn.Module):
    """Reads the facts from the encoder's state at the end of the sentence."""

    def __init__(self):
        super().__init__()
        self.named = nn.Linear(TEXT_WIDTH, PAIRS)
        self.pair = nn.Embedding(PAIRS, 64)
        self.relation = nn.Sequential(nn.Linear(TEXT_WIDTH + 128, 256), nn.SiLU(), nn.Linear(256, len(RELATIONS) + 1))

    def forward(self, state, first, second):
        queries = torch.cat(
            [state[:, None].expand(-1, first.shape[1], -1), self.pair(first), self.pair(second)], dim=-1
        )
        return self.named(state), self.relation(queries)


def learn_facts(encoder, tokenizer, ids: torch.Tensor, args) -> None:
    """Train `encoder` in place for `args.text_steps` steps on the first wording of the first training scenes."""
    scenes = draw_scenes(min(args.scenes, 50_000), held_out=False)
    ids = ids[: len(scenes), 0].long()
    named, relations = torch.zeros(len(scenes), PAIRS), torch.full((len(scenes), 6, 3), -1)
    for i, scene in enumerate(scenes):
        pair, between = facts(scene)
        named[i, pair] = 1
        if between:
            relations[i, : len(between)] = torch.tensor(between)
    named, relations = named.to(args.device), relations.to(args.device)
    end = (ids == tokenizer.eos_token_id).int().argmax(dim=1)
    heads = Facts().to(args.device)

    def draw(generator):
        index = torch.randint(len(ids), (args.batch,), generator=generator, device=ids.device)
        return ids[index], end[index], named[index], relations[index]

    def loss(words, at, names, between):
        state = encoder(words).last_hidden_state
        state = state[torch.arange(len(words), device=words.device), at].float()
        there, related = heads(state, between[..., 0].clamp(min=0), between[..., 1].clamp(min=0))
        return 10 * F.binary_cross_entropy_with_logits(there.float(), names) + F.cross_entropy(
            related.float().flatten(0, 1), between[..., 2].flatten(), ignore_index=-1
        )

    modules = nn.ModuleDict({"encoder": encoder, "heads": heads})
    fit(
        "text-encoder",
        modules,
        draw,
        loss,
        steps=args.text_steps,
        batch=args.batch,
        lr=1e-3,
        work=args.work,
        compiled=False,
    )
