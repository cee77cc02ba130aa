"""
Stage 2, skill discovery: H-Net dynamic chunking over the latent actions of stage 1.

A stage reads a sequence of vectors, decides where one piece ends and the next begins, and hands
only the first vector of each piece to the stage above it; what comes back is spread over the
frames again, and the whole network predicts the next latent action (HiLAM, arXiv 2603.05815,
section 3.2; H-Net, arXiv 2507.07955). Two stages by default: primitive skills, then sub-goals.

    h = E(z)                                      encoder, causal, ends in RMSNorm
    p_1 = 1, p_t = (1 - cos(q_{t-1}, k_t)) / 2    boundary probability; b_t = 1 where p_t >= 0.5
    z' = Chunk(h; b)                              keep the vectors at boundaries
    y  = DeChunk(M(z'); b, p) * ste(c) + R(h)     M: again a stage, or a transformer at the top
    loss = L_latent + rec * L_rec + ratio * L_ratio

    python skills.py                              # toy world, a minute on a laptop
    python skills.py --data data/libero_10 --out out/libero_10 --chunk 20 3

Expect on the toy world: boundaries of stage 1 on grasps and releases with F1 above 0.9, uniform
ones 0.25. Writes to OUT: skills.pt, skills.json, skills.png, skills_log.csv and its curves, and for
each packed set boundaries.SET.npy (T, stages) bool and for each stage s skills<s>.SET.npy (T,
width), the skill of every frame, and uniform<s>.SET.npy, the same of a uniform cut, a control.
"""

import math
import random
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.signal import find_peaks
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import nn
from tqdm import tqdm

import data
from data import COUNT, REAL, SHARE, fail, number, write
from lam import draw_strip, load_lam, ridge


def get_args():
    parser = data.make_parser(__doc__, steps=400)
    add = parser.add_argument_group("H-Net").add_argument
    add("--chunk", type=number(float, 1.5), nargs="+", default=[15.0, 3.0], help="N of each stage")
    add("--least", type=COUNT, default=5, help="shortest chunk of stage 1 in frames; H-Net: 1")
    text = (
        "a frame's skill is the mean of the vectors from it to its segment's end (ahead) or, as in "
    )
    text += "the paper, the segment's first vector"
    add("--skill", choices=["ahead", "first"], default="ahead", help=text)
    add("--width", type=number(int, 8), default=64, help="of a vector")
    add("--layers", type=COUNT, default=4, help="blocks in an encoder, a decoder; twice at the top")
    add = parser.add_argument_group("loss and optimizer").add_argument
    add("--rec", type=REAL, default=0.1, help="weight of L_rec; 0: off")
    add("--ratio", type=REAL, default=0.1, help="weight of L_ratio; H-Net: 0.03")
    text = "shares of --lr of the embedding and k, and of the encoders"
    add("--slow", type=SHARE, nargs=2, default=[0.03, 0.3], help=text)
    add("--batch", type=COUNT, default=16, help="episodes a step, equally of each set")
    add("--window", type=number(int, 2), default=128, help="frames of an episode seen at a time")
    add("--lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate of AdamW")
    return parser.parse_args()


# ------------------------------------------------------------------------------- dynamic chunking
# What one stage decided. probability p and boundary b: (B, L); mask (B, L), False on padding;
# vectors h (B, L, D), the encoder's.
Routing = namedtuple("Routing", "probability boundary mask vectors")


def ste(c):
    """Straight-through estimator: 1 forward, the identity backward (H-Net, eq. 7)."""
    return c + (1 - c).detach()


def route(q, k, mask, least=1, apart=1):
    """Boundary probability p_t and boundaries b_t, (B, L), from q, k (B, L, D) (H-Net, eq. 4).

    The first position is always a boundary, padding never; no chunk is shorter than least. Where
    adjacent vectors overlap, k_t meets the q of apart positions before.
    """
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    before = torch.cat([q[:, :1].expand(-1, apart, -1), q[:, 1:-apart]], dim=1)[:, : q.shape[1] - 1]
    cosine = (before * k[:, 1:]).sum(-1)  # cos(q_{t-1}, k_t)
    p = torch.cat([cosine.new_ones(len(q), 1), (1 - cosine) / 2], dim=1)  # p_1 = 1
    boundary = (p >= 0.5) & mask
    least = max(least, apart)
    for t in range(1, p.shape[1] if least > 1 else 0):
        boundary[:, t] &= ~boundary[:, max(0, t - least + 1) : t].any(1)
    return p, boundary


def chunk(h, boundary):
    """Chunk: keep the vectors at boundaries, (B, L, D) -> (B, M, D), M the most chunks of a row.

    Returns also which of them are no padding, (B, M), and where each stood, (B, M).
    """
    count = boundary.sum(1)
    position = (~boundary).int().argsort(dim=1, stable=True)[:, : int(count.max())]
    mask = torch.arange(position.shape[1], device=h.device) < count[:, None]
    return h.gather(1, position[..., None].expand(-1, -1, h.shape[-1])), mask, position


def dechunk(x, p, boundary, position):
    """DeChunk: smooth the chunks x (B, M, D) and spread them over their positions, (B, L, D).

    y_m = (1 - p_m) y_{m-1} + p_m x_m, then out_t = ste(c_t) y of t's chunk, with the confidence
    c_t = p_t at boundaries and 1 - p_t elsewhere (H-Net, eq. 5-9). The recurrence is a product
    with the matrix W_mn = p_n (1 - p_{n+1}) ... (1 - p_m), n <= m, made in log space.
    """
    kept = p.gather(1, position).clamp(1e-4, 1 - 1e-4)  # p_m (B, M)
    log = torch.log1p(-kept).cumsum(1)
    weights = (log[:, :, None] - log[:, None, :]).tril().exp().tril() * kept[:, None, :]
    y = weights @ x  # (B, M, D)
    which = (boundary.long().cumsum(1) - 1).clamp_min(0)  # (B, L) the chunk of each position
    first_row = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    spread = F.embedding(which + first_row, y.flatten(0, 1))
    confidence = torch.where(boundary, p, 1 - p)
    return spread * ste(confidence)[..., None]


def ratio_loss(boundary, p, mask, n):
    """N/(N-1) ((N-1) F G + (1-F)(1-G)), F the share of boundaries, G the mean probability, over
    unpadded positions (H-Net, eq. 10). Returns the loss, F and G."""
    count = mask.sum()
    f = (boundary & mask).sum() / count
    g = (p * mask).sum() / count
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)), f, g


# ---------------------------------------------------------------------------------------- network
class Block(nn.Module):
    """Pre-norm causal transformer block, (B, L, D) -> (B, L, D); attention fades with distance
    (ALiBi). It starts as the identity, so that the router first sees the latents as they are."""

    def __init__(self, width, heads=4):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.RMSNorm(width)
        self.norm2 = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)

    def forward(self, x):
        b, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, length, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, L, D / heads) each
        at = torch.arange(length, device=x.device)
        ago = at[:, None] - at  # how far back, negative in the future
        slope = -(0.5 ** torch.arange(1, self.heads + 1, device=x.device)[:, None, None])
        bias = (slope * ago).masked_fill(ago < 0, -torch.inf).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, bias[None])
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack(layers, width):
    return nn.Sequential(*[Block(width) for _ in range(layers)])


class Stage(nn.Module):
    """One H-Net stage around its main network M: again a Stage, or at the top a transformer."""

    def __init__(self, width, stages, layers, least=1, apart=1):
        super().__init__()
        self.least = least
        self.apart = apart
        self.encoder = stack(layers, width).append(nn.RMSNorm(width, elementwise_affine=False))
        self.decoder = stack(layers, width)
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width, bias=False)
        self.residual = nn.Linear(width, width, bias=False)  # R
        nn.init.eye_(self.q.weight)
        nn.init.eye_(self.k.weight)
        nn.init.zeros_(self.residual.weight)
        self.main = Stage(width, stages - 1, layers) if stages > 1 else stack(2 * layers, width)

    def forward(self, x, mask):
        """x (B, L, D), mask (B, L) -> output (B, L, D), Routings of this stage and all above it."""
        h = self.encoder(x)
        # H-Net makes k of h as well; made of x it is what comes, and q of h is what was foretold
        p, boundary = route(self.q(h), self.k(x), mask, self.least, self.apart)
        z, inner_mask, position = chunk(h, boundary)
        if isinstance(self.main, Stage):
            z, above = self.main(z, inner_mask)
        else:
            z, above = self.main(z), []
        out = dechunk(z, p, boundary, position) + self.residual(h)
        return self.decoder(out), [Routing(p, boundary, mask, h), *above]


class HNet(nn.Module):
    """Standardised latents z (B, L, latent), mask (B, L) -> at t a prediction of z_{t+1}, and the
    Routings of all stages. Latents of a gap above 1 overlap: then the change of z is predicted."""

    def __init__(self, latent, width, stages, layers, least=1, gap=1):
        super().__init__()
        self.overlap = gap > 1
        self.embed = nn.Linear(latent, width, bias=False)
        self.stage = Stage(width, stages, layers, least, max(1, gap // 2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, latent)
        nn.init.orthogonal_(self.embed.weight)  # keeps the angles between latents
        if self.overlap:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)

    def forward(self, z, mask):
        y, routings = self.stage(self.embed(z), mask)
        prediction = self.head(self.norm(y))
        return (prediction + z if self.overlap else prediction), routings


def frame_rate(routings):
    """Every stage at frame rate: boundaries, a list of (B, L) bool, and the encoder's vector of the
    position that each frame belongs to, a list of (B, L, D)."""
    boundaries, vectors = [], []
    inner = torch.ones_like(routings[0].boundary)  # the frames at which this stage has a position
    for routing in routings:
        index = (inner.long().cumsum(1) - 1).clamp_min(0)
        width = routing.vectors.shape[-1]
        vectors.append(routing.vectors.gather(1, index[..., None].expand(-1, -1, width)))
        inner = inner & routing.boundary.gather(1, index)
        boundaries.append(inner)
    return boundaries, vectors


def skill_vectors(vectors, boundary, rule):
    """zbar_t = z_{k_t}, k_t = cumsum(b): the skill of every frame, (T, D), from the encoder's vectors
    (T, D) and the boundaries (T,). first: the vector at the segment's first frame, as Chunk keeps
    it; ahead: the mean of the vectors from frame t to the segment's end, what is still to come."""
    starts = np.flatnonzero(boundary)
    segment = np.cumsum(boundary) - 1  # k_t
    if rule == "first":
        return vectors[starts[segment]]
    ends = np.append(starts[1:], len(boundary))[segment]
    total = np.cumsum(vectors, axis=0, dtype=np.float64)
    total = np.concatenate([np.zeros_like(total[:1]), total])  # row t: the sum of all before t
    t = np.arange(len(boundary))
    return ((total[ends] - total[t]) / (ends - t)[:, None]).astype(np.float32)


def uniform_boundaries(boundary, starts, lengths):
    """Boundaries (T,) cut uniformly, as many in each episode as boundary (T,) has there."""
    uniform = np.zeros_like(boundary)
    for begin, length in zip(starts, lengths, strict=True):
        count = int(boundary[begin : begin + length].sum())
        uniform[begin + np.arange(count) * length // count] = True
    return uniform


# ------------------------------------------------------------------------------- data and losses
def load_latents(dataset, out):
    """The latents (T, D) that stage 1 wrote of a packed set."""
    path = Path(out, f"latents.{dataset.name}.npy")
    z = np.load(path) if path.exists() else np.zeros((0, 1))
    if len(z) != dataset.total or not np.isfinite(z).all():
        fail(f"{path} is missing or of other data: run `python lam.py` with the same --out first")
    return z


def get_batch(sets, latents, episodes, gap, args, rng):
    """Stretches of random episodes: z (B, L, D), mask (B, L), rows in the packed sets (B, L), and
    the number of the set of each, (B,)."""
    parts = []
    for i, (dataset, z) in enumerate(zip(sets, latents, strict=True)):
        e = rng.choice(episodes[i], max(1, args.batch // len(sets)))
        length = (dataset.length[e] - gap)[:, None]
        first = (rng.random(length.shape) * np.maximum(1, length - args.window + 1)).astype(int)
        t = first + np.arange(args.window)  # (B, window)
        row = dataset.start[e][:, None] + np.minimum(t, length - 1)
        parts.append((z[row], t < length, row, np.full(len(e), i)))
    z, mask, rows, source = (np.concatenate(column) for column in zip(*parts, strict=True))
    return torch.from_numpy(z), torch.from_numpy(mask), rows, source


def reconstruction(lam, prediction, mask, rows, source, sets, scale, rng):
    """L_rec at 16 positions: the FROZEN FDM draws I_{t+1+k} from I_{t+1} and the PREDICTED latent
    z_{t+1}; squared error over that of copying I_{t+1}."""
    places = rng.permutation(np.argwhere(mask[:, 1:].cpu().numpy()))[:16]
    error, copy = 0.0, 0.0
    for i, dataset in enumerate(sets):
        b, t = places[source[places[:, 0]] == i].T
        if len(b) == 0:
            continue
        mean, deviation = scale[i][0].to(prediction.device), scale[i][1]
        now = lam.frames(dataset, rows[b, t + 1], prediction.device)
        future = lam.frames(dataset, rows[b, t + 1] + lam.gap, prediction.device)
        drawn = lam.fdm(now, prediction[b, t] * deviation + mean)
        error = error + F.mse_loss(drawn, future, reduction="sum")
        copy = copy + F.mse_loss(now, future, reduction="sum")
    return error / copy


# ---------------------------------------------------------------------------------------- figures
@torch.no_grad()
def segment(model, dataset, latents, gap, device):
    """All of a packed set: boundaries (T, stages) bool, the encoder's vectors at frame rate, a list
    of (T, D), and at t the prediction of latent t+1, (T, latent). The last k frames of an episode,
    which have no latent, stay in its last segment."""
    parts = []
    groups = np.array_split(np.arange(len(dataset.start)), 1 + len(dataset.start) // 32)
    for group in tqdm(groups, f"skills of {dataset.name}", disable=None):
        known = np.maximum(1, dataset.length[group] - gap)[:, None]
        t = np.arange(known.max())
        z = torch.from_numpy(latents[dataset.start[group][:, None] + np.minimum(t, known - 1)])
        prediction, routings = model(z.to(device), torch.from_numpy(t < known).to(device))
        marks, vectors = frame_rate(routings)
        arrays = [x.cpu().numpy() for x in (torch.stack(marks, -1), prediction, *vectors)]
        for i, e in enumerate(group):
            rows = np.minimum(np.arange(dataset.length[e]), known[i] - 1)
            parts.append([array[i, rows] for array in arrays])
            parts[-1][0][known[i, 0] :] = False
    boundaries, prediction, *vectors = (np.concatenate(x) for x in zip(*parts, strict=True))
    return boundaries, vectors, prediction


def events(phase, names):
    """Frames at which the true skill changes, (L,) -> (events,): the middle of each grasp and
    release, and the other changes but the first frame and the end of a grasp or release."""
    starts = np.flatnonzero(np.diff(phase, prepend=phase[0] - 1))
    ends = np.append(starts[1:], len(phase))
    found = []
    after_short = True  # the first frame is no event
    for begin, end in zip(starts, ends, strict=True):
        short = names[phase[begin]] in ("grasp", "release")
        if short:
            found.append((begin + end - 1) // 2)
        elif not after_short:
            found.append(begin)
        after_short = short
    return np.array(found, int)


def f1_score(found, true, slack=2):
    """F1 of boundaries against events, lists of arrays, one an episode: a boundary counts for one
    event within slack frames, by a maximum bipartite matching."""
    hits = 0
    for boundary, event in zip(found, true, strict=True):
        near = csr_matrix(np.abs(boundary[:, None] - event) <= slack)
        hits += int((maximum_bipartite_matching(near) >= 0).sum()) if near.nnz else 0
    return round(2 * hits / max(1, sum(map(len, found)) + sum(map(len, true))), 4)


def peaks(z, count):
    """A control without a network: the count highest peaks of the cosine dissimilarity of adjacent
    latents z (L, D)."""
    a, b = torch.from_numpy(z[1:]), torch.from_numpy(z[:-1])
    change = np.pad(1 - F.cosine_similarity(a, b).numpy(), 1, constant_values=-1)
    top = find_peaks(change)[0]
    return np.sort(top[np.argsort(-change[top], kind="stable")[:count]])


def boundary_f1(sets, latents, found, even, gap):
    """F1 on held-out episodes whose phases are known of a stage's boundaries, of uniform ones and of
    as many peaks; lists of (T,). The first frame is a boundary for free and does not count."""
    true, cuts = [], {"boundary": [], "uniform": [], "peaks": []}
    for dataset, z, marks, uniform in zip(sets, latents, found, even, strict=True):
        phase = dataset.open("truth_phase")
        for e in dataset.split("val") if phase is not None else []:
            rows = dataset.rows([e], gap)
            true.append(events(phase[rows], dataset.phases))
            cuts["boundary"].append(np.flatnonzero(marks[rows])[1:])
            cuts["uniform"].append(np.flatnonzero(uniform[rows])[1:])
            cuts["peaks"].append(peaks(z[rows], len(cuts["boundary"][-1])))
    return {f"f1_{name}": f1_score(found, true) for name, found in cuts.items()} if true else {}


def skill_r2(dataset, skills, boundary):
    """What a frame's skill says, read by ridge regression and held out: R2 of the frame's action, and
    of the sum of the actions (without the gripper's) from it to its segment's end."""
    actions = np.asarray(dataset.true_actions(), np.float64)
    starts = np.flatnonzero(boundary)
    ends = np.append(starts[1:], len(boundary))[np.cumsum(boundary) - 1]
    total = np.concatenate([np.zeros_like(actions[:1]), np.cumsum(actions, axis=0)])
    ahead = (total[ends] - total[:-1])[:, :-1]
    train, val = dataset.rows(dataset.split("train")), dataset.rows(dataset.split("val"))
    r2 = [ridge(skills[train], y[train], skills[val], y[val]) for y in (actions, ahead)]
    return {"action_r2": r2[0], "segment_end_r2": r2[1]}


def draw(path, sets, boundaries):
    """A held-out video of each set with its boundaries (HiLAM, figure 4)."""
    strip, marks = [], {}
    for dataset, b in zip(sets, boundaries, strict=True):
        rows = dataset.rows(dataset.split("val")[:1])[::2]
        for line in np.array_split(rows, -(-len(rows) // 20)):
            for c, t in enumerate(line):
                stages = int(b[t : t + 2].any(0).sum())  # how many stages cut here
                if stages:
                    marks[len(strip), c] = ["orange", "red", "purple"][min(stages, 3) - 1]
            strip.append(
                (f"{dataset.name}, every second frame", dataset.upright(dataset.frames[line]))
            )
    caption = "a skill begins at an orange edge (stage 1) and at a red one (stage 2 as well)"
    draw_strip(path, strip, caption, marks)


def report(args, model, sets, latents, gap, device):
    """Write boundaries and skills, measure and print what they are worth, draw."""
    found = [segment(model, d, z, gap, device) for d, z in zip(sets, latents, strict=True)]
    boundaries, vectors, predictions = zip(*found, strict=True)
    val = [dataset.rows(dataset.split("val"), gap + 1) for dataset in sets]
    triples = list(zip(latents, predictions, val, strict=True))
    error = sum(np.abs(z[rows + 1] - guess[rows]).sum() for z, guess, rows in triples)
    copy = sum(np.abs(z[rows + 1] - z[rows]).sum() for z, _, rows in triples)
    figures = {"latent_l1_over_copy": round(float(error / copy), 4), "stages": []}
    print("on held-out episodes:")
    print(f"  next latent, l1 error over copying the last: {error / copy:.2f}")
    positions = sum(map(len, val))
    for stage, target in enumerate(args.chunk):
        marks = [b[:, stage] for b in boundaries]
        even = [uniform_boundaries(b, d.start, d.length) for b, d in zip(marks, sets, strict=True)]
        kept = sum(int(b[rows].sum()) for b, rows in zip(marks, val, strict=True))
        row = {"rate": round(kept / positions, 4)}
        positions = kept
        row |= boundary_f1(sets, latents, marks, even, gap)
        print(f"  stage {stage + 1}: boundary rate {row['rate']:.3f}, target {1 / target:.3f}")
        if "f1_boundary" in row:
            print(
                "    F1 with true changes {f1_boundary:.2f}, uniform {f1_uniform:.2f}, "
                "peaks of latent change {f1_peaks:.2f}".format(**row)
            )
        for dataset, hs, found_at, uniform_at in zip(sets, vectors, marks, even, strict=True):
            for kind, at in (("skills", found_at), ("uniform", uniform_at)):
                skill = skill_vectors(hs[stage], at, args.skill)
                write(Path(args.out, f"{kind}{stage + 1}.{dataset.name}.npy"), skill)
                if dataset.true_actions() is not None:
                    row[f"{kind}_says"] = skill_r2(dataset, skill, at)
                    print(f"    {kind}, R2 with {dataset.name}'s {row[f'{kind}_says']}")
        figures["stages"].append(row)
    for dataset, b in zip(sets, boundaries, strict=True):
        write(Path(args.out, f"boundaries.{dataset.name}.npy"), b)
    write(Path(args.out, "skills.json"), figures)
    draw(Path(args.out, "skills.png"), sets, boundaries)


def standardise(z, rows):
    """Latents (T, D) less the mean of these rows, over one deviation for all numbers: else adjacent
    latents are parallel, and nothing is cut. Returns them with mean (D,) and deviation."""
    mean, deviation = z[rows].mean(0), float(z[rows].var(0).mean() ** 0.5) + 1e-6
    return ((z - mean) / deviation).astype(np.float32), (torch.from_numpy(mean), deviation)


def parameter_groups(model, slow):
    """k stays near the latents; q and, less freely, the encoders learn to foretell it. A boundary is
    where that fails. slow: the shares of the learning rate of embedding and k, and of encoders."""
    groups = {slow[0]: [], slow[1]: [], 1.0: []}
    for name, parameter in model.named_parameters():
        if "embed" in name or ".k." in name:
            groups[slow[0]].append(parameter)
        else:
            groups[slow[1] if "encoder" in name else 1.0].append(parameter)
    return [{"params": parameters, "share": share} for share, parameters in groups.items()]


def main():
    args = get_args()
    device, _, world = data.start(args.out, args.device)
    if world > 1:
        fail("skills.py runs in one process: start it without torchrun")
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    sets = data.open_sets(args.data)
    raw = [load_latents(dataset, args.out) for dataset in sets]
    lam = load_lam(args.out, sets[0], device).requires_grad_(False)  # frozen
    gap = lam.gap
    used = [dataset.rows(dataset.split("train"), gap) for dataset in sets]
    pairs = [standardise(z, rows) for z, rows in zip(raw, used, strict=True)]
    latents, scale = zip(*pairs, strict=True)
    episodes = [[e for e in d.split("train") if d.length[e] > gap + 1] for d in sets]
    stages = len(args.chunk)
    model = HNet(raw[0].shape[1], args.width, stages, args.layers, args.least, gap).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.slow), lr=args.lr, weight_decay=0.01)
    settings = vars(args) | {"data": data.checksum(*raw)}
    path = Path(args.out, "skills.pt")
    first, log = data.resume(path, "skills", settings, model, optimizer)
    seen, begin = [], time.time()
    for step in tqdm(range(first, args.steps), "skills", disable=None):
        rng = np.random.default_rng([args.seed, step])  # chance hangs on seed and step alone, so
        torch.manual_seed(args.seed * 1_000_003 + step)  # a resumed run repeats itself exactly
        share = 0.525 + 0.475 * math.cos(math.pi * step / args.steps)  # a cosine to a twentieth
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * args.lr * share * min(1, (step + 1) / 100)
        z, mask, rows, source = get_batch(sets, latents, episodes, gap, args, rng)
        z, mask = z.to(device), mask.to(device)
        prediction, routings = model(z, mask)
        loss = (prediction[:, :-1] - z[:, 1:]).abs()[mask[:, 1:]].mean()  # L_latent, l1
        row = {"step": step + 1, "L_latent": loss.item()}
        if args.rec:
            l_rec = reconstruction(lam, prediction, mask, rows, source, sets, scale, rng)
            loss = loss + args.rec * l_rec
            row["L_rec"] = l_rec.item()
        for s, (routing, n) in enumerate(zip(routings, args.chunk, strict=True), 1):
            l_ratio, f, g = ratio_loss(routing.boundary, routing.probability, routing.mask, n)
            loss = loss + args.ratio * l_ratio
            row |= {f"F{s}": f.item(), f"G{s}": g.item()}
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append(row)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            log.append(data.log_row(seen, "skills", first, begin))
            data.write_log(Path(args.out, "skills"), log)
            record = {"stage": "skills", "settings": settings, "step": step + 1}
            record |= {"steps": args.steps, "log": log, "model": model.state_dict()}
            write(path, record | {"optimizer": optimizer.state_dict()})
            seen = []
    report(args, model, sets, latents, gap, device)


if __name__ == "__main__":
    main()
