"""
Stage 2, skill discovery: H-Net dynamic chunking over the latent actions of stage 1.

A stage of H-Net reads vectors, decides where a chunk begins, and hands the first vector of each to
the stage above; what comes back is spread over the frames and predicts the next latent action
(HiLAM, arXiv 2603.05815, section 3.2; H-Net, arXiv 2507.07955).

    python skills.py                      # toy world, two minutes; LIBERO: --chunk 20 3

Expect on the toy world: F1 of H-Net's first boundaries with grasps and releases above 0.9, of a
uniform cut 0.25. Writes to OUT skills.pt, .json, .png, the log, and for each set boundaries.SET.npy
(T, stages), skills<s>.SET.npy, a skill a frame, and uniform<s>.SET.npy, the same of a uniform cut.
"""

import math
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from scipy.signal import find_peaks
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
from data import COUNT, REAL, SHARE, WIDTH, fail, number, write
from lam import draw_strip, encode, load_lam, ridge


def get_args():
    parser = data.make_parser(__doc__, steps=600)
    add = parser.add_argument_group("H-Net").add_argument
    add("--chunk", type=number(float, 1.5), nargs="+", default=[15.0, 3.0], help="N of each stage")
    add("--least", type=COUNT, default=5, help="shortest chunk of z1; at least gap / 2; H-Net: 1")
    add("--skill", choices=["plan", "first"], default="plan", help="the paper: first")
    add("--width", type=WIDTH, default=64, help="of a vector")
    add("--layers", type=COUNT, default=4, help="blocks in an encoder, a decoder; twice at the top")
    add("--rec", type=REAL, default=0.1, help="weight of L_rec")
    add("--ratio", type=REAL, default=0.1, help="weight of L_ratio; H-Net: 0.03")
    add("--slow", type=SHARE, nargs=2, default=[0.03, 0.1], help="lr shares: embed and k; encoders")
    add("--batch", type=COUNT, default=16, help="episodes a step, equally of each set")
    add("--lr", type=number(float, 1e-9), default=1e-3, help="peak learning rate of AdamW")
    return parser.parse_args()


# ------------------------------------------------------------------------------- dynamic chunking
# What a stage decided: p_t, b_t and mask (B, L), False on padding; its encoder's h (B, L, D).
Routing = namedtuple("Routing", "probability boundary mask vectors")


def ste(c):
    """Straight-through estimator: 1 forward, the identity backward (H-Net, eq. 7)."""
    return c + (1 - c).detach()


def route(q, k, mask, least=1, apart=1):
    """Boundary probability p_t and boundaries b_t, (B, L), of q, k (B, L, D) (H-Net, section 2.2).
    k_t is compared with q_{t-apart} (H-Net: 1); boundaries are at least `least` positions apart."""
    at = torch.arange(1, q.shape[1], device=q.device)
    before, now = q[:, (at - apart).clamp_min(0)], k[:, 1:]  # q_{t-apart}, k_t
    norms = torch.linalg.vecdot(before, before) * torch.linalg.vecdot(now, now)
    cosine = torch.linalg.vecdot(before, now) * norms.clamp_min(1e-16).rsqrt()
    p = F.pad((1 - cosine) / 2, (1, 0), value=1.0)  # p_1 = 1
    boundary = (p >= 0.5) & mask
    if least > 1:
        for t in range(1, p.shape[1]):  # no boundary soon after the last one
            boundary[:, t] &= ~boundary[:, max(0, t + 1 - least) : t].any(1)
    return p, boundary


def chunk(h, boundary):
    """Chunk: the vectors at boundaries in order (B, M, D); which are real and where (B, M)."""
    count = boundary.sum(1)
    order = boundary.int().argsort(dim=1, descending=True, stable=True)  # boundaries come first
    position = order[:, : int(count.max())]
    mask = torch.arange(position.shape[1], device=h.device) < count[:, None]
    return torch.take_along_dim(h, position[..., None], dim=1), mask, position


def dechunk(x, p, boundary, position):
    """DeChunk: smooth the chunks x (B, M, D) and spread them over their positions, (B, L, D):
    y_m = (1 - p_m) y_{m-1} + p_m x_m, then ste(c_t) times the y of t's chunk (H-Net, eq. 5-9). The
    recurrence is a product with W_mn = p_n (1 - p_{n+1}) ... (1 - p_m), made in log space."""
    p_m = p.gather(1, position).clamp(1e-4, 1 - 1e-4)  # (B, M)
    log_rest = torch.log1p(-p_m).cumsum(1)  # log of (1 - p_1) ... (1 - p_m)
    log_w = log_rest[:, :, None] - log_rest[:, None, :]  # log of (1 - p_{n+1}) ... (1 - p_m)
    future = torch.ones_like(log_w, dtype=torch.bool).triu(1)  # n > m: no part of y_m
    y = (log_w.masked_fill(future, -torch.inf).exp() * p_m[:, None, :]) @ x  # (B, M, D)
    which = boundary.long().cumsum(1) - 1  # (B, L) the chunk of each position
    row = which + y.shape[1] * torch.arange(len(y), device=y.device)[:, None]  # of (B M, D)
    spread = F.embedding(row, y.flatten(0, 1))  # y[b, which[b, t]]; other look-ups are slower
    c = torch.where(boundary, p, 1 - p)  # c_t, how sure the router is of b_t
    return spread * ste(c)[..., None]


def ratio_loss(boundary, p, mask, n):
    """The ratio loss over unpadded positions for chunks of n (H-Net, eq. 10), and its F and G."""
    count = mask.sum()
    f = (boundary & mask).sum() / count
    g = (p * mask).sum() / count
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)), f, g


# ---------------------------------------------------------------------------------------- network
class Block(nn.Module):
    """Causal transformer block, (B, L, D) to the same; bias like ALiBi's; at first the identity."""

    def __init__(self, width):
        super().__init__()
        self.norm1 = nn.RMSNorm(width)
        self.norm2 = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width, bias=False)
        nn.init.zeros_(self.proj.weight)
        nn.init.zeros_(self.down.weight)  # the router at first sees the embedded latents

    def forward(self, x):
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, 4, -1))  # 4 heads
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, 4, L, D / 4) each
        at = torch.arange(x.shape[1], device=x.device)
        ago = at[:, None] - at  # how far back, negative in the future
        slope = -(0.5 ** torch.arange(1, 5, device=x.device)[:, None, None])
        bias = (slope * ago).masked_fill(ago < 0, -torch.inf).to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, bias[None])
        x = x + self.proj(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def stack(layers, width):
    return nn.Sequential(*[Block(width) for _ in range(layers)])


class Stage(nn.Module):
    """One H-Net stage around its main network M: again a Stage, or at the top a transformer."""

    def __init__(self, width, stages, layers, least=1, apart=1):
        super().__init__()
        self.limits = (max(least, apart), apart)
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
        p, boundary = route(self.q(h), self.k(x), mask, *self.limits)  # H-Net makes k of h too
        z, inner_mask, position = chunk(h, boundary)
        top = not isinstance(self.main, Stage)
        z, above = (self.main(z), []) if top else self.main(z, inner_mask)  # M(z)
        out = dechunk(z, p, boundary, position) + self.residual(h)
        return self.decoder(out), [Routing(p, boundary, mask, h), *above]


class HNet(nn.Module):
    """Standardised latents z (B, L, D), mask (B, L) -> at t the prediction of z_{t+1}; Routings.
    settings: a dict of the flags; gap: from frame I_t to I_{t+gap}."""

    def __init__(self, settings, latent, gap):
        super().__init__()
        width, stages = settings["width"], len(settings["chunk"])
        self.overlap = gap > 1  # then adjacent latents share frames: their change is predicted
        self.embed = nn.Linear(latent, width, bias=False)
        self.stage = Stage(width, stages, settings["layers"], settings["least"], max(1, gap // 2))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, latent)
        nn.init.orthogonal_(self.embed.weight)  # keeps angles, if latents are not wider than width
        for parameter in self.head.parameters() if self.overlap else []:
            nn.init.zeros_(parameter)

    def forward(self, z, mask):
        y, routings = self.stage(self.embed(z), mask)
        return self.head(self.norm(y)) + self.overlap * z, routings


def sum_ahead(values, boundary):
    """Sums of values (T, D) from each frame to its segment's end; where the next begins (T,)."""
    ends = np.append(np.flatnonzero(boundary)[1:], len(boundary))  # where each segment ends
    next_start = ends[np.cumsum(boundary) - 1]
    before = np.pad(np.cumsum(values, 0, np.float64), ((1, 0), (0, 0)))  # row t: all before t
    return before[next_start] - before[:-1], next_start


def skill_vectors(vectors, boundary, rule, last):
    """The skill of every frame, from vectors (T, D), boundary (T,) and the last frame of each one's
    episode (T,). first: the vector at its segment's first frame. plan, (T, 2 D): the mean of the
    vectors from this frame to its segment's end, and beside it the mean over the next segment."""
    if rule == "first":
        which = np.cumsum(boundary) - 1  # the paper's k_t, from 0: the number of t's segment
        return vectors[np.flatnonzero(boundary)[which]]  # zbar_t = z_{k_t}
    total, next_start = sum_ahead(vectors, boundary)
    count = next_start - np.arange(len(boundary))
    ahead = (total / count[:, None]).astype(np.float32)
    after = ahead[np.minimum(next_start, last)]  # in an episode's last segment its last vector
    return np.concatenate([ahead, after], axis=1)


def uniform_boundaries(boundary, starts, lengths):
    """Boundaries (T,) cut uniformly, as many in each episode as boundary (T,) has there."""
    uniform = np.zeros_like(boundary)
    for begin, length in zip(starts, lengths, strict=True):
        count = int(boundary[begin : begin + length].sum())
        uniform[begin + np.arange(count) * length // count] = True
    return uniform


# ------------------------------------------------------------------------------- data and losses
def load_rows(dataset, out, name):
    """The latents or skills of a packed set, (T, D); exits where they were made from other data."""
    path = Path(out, f"{name}.{dataset.name}.npy")
    stage = "lam" if name == "latents" else "skills"
    record = Path(out, f"{stage}.pt")
    again = f"delete it, run `python {stage}.py` again"
    made_from = data.load_checkpoint(record, stage)["settings"]["data"]
    if dataset.checksum() not in made_from:
        fail(f"{record} was not made from {dataset.path} as it is now: {again}")
    try:
        rows = np.load(path)
        if len(rows) != dataset.total or not np.isfinite(rows).all():
            raise ValueError
    except (OSError, ValueError, EOFError):
        fail(f"{path} is missing, damaged or of other data: {again}")
    if stage == "skills" and data.checksum(load_rows(dataset, out, "latents")) not in made_from:
        fail(f"{record} was made from other latents: {again}")
    return rows


def get_batch(sets, latents, episodes, gap, batch, rng, device):
    """Parts of random episodes, set after set: z (B, L, D), mask, rows of packed sets (B, L)."""
    count, window = max(1, batch // len(sets)), 128  # episodes of a set, frames of an episode
    z, mask, rows = [], [], []
    for dataset, latent, choice in zip(sets, latents, episodes, strict=True):
        e = rng.choice(choice, count)
        length = (dataset.length[e] - gap)[:, None]
        first = (rng.random(length.shape) * np.maximum(1, length - window + 1)).astype(int)
        t = first + np.arange(window)  # (count, L)
        rows.append(dataset.start[e][:, None] + np.minimum(t, length - 1))
        mask.append(torch.from_numpy(t < length))
        z.append(torch.from_numpy(latent[rows[-1]]))
    return torch.cat(z).to(device), torch.cat(mask).to(device), np.concatenate(rows)


def reconstruction(lam, prediction, mask, rows, sets, scale, rng):
    """L_rec at 16 places: error of the FROZEN FDM with the PREDICTED z_{t+1}, over copying's."""
    places = rng.permutation(np.argwhere(mask[:, 1:].cpu().numpy()))[:16]  # (16, 2): b, t
    set_of = places[:, 0] // (len(mask) // len(sets))  # a batch holds the sets one after another
    error, copy = 0.0, 0.0
    for i in np.unique(set_of):
        b, t = places[set_of == i].T
        mean, deviation = scale[i]
        z = prediction[b, t] * deviation + torch.as_tensor(mean, device=prediction.device)
        now = lam.frames(sets[i], rows[b, t + 1], prediction.device)
        future = lam.frames(sets[i], rows[b, t + 1] + lam.gap, prediction.device)
        error = error + F.mse_loss(lam.fdm(now, z), future, reduction="sum")
        copy = copy + F.mse_loss(now, future, reduction="sum")
    return error / copy.clamp_min(0.1)  # 0 in still video; the toy world has 20 and more


# ---------------------------------------------------------------------------------------- figures
@torch.no_grad()
def segment(model, dataset, latents, gap, device):
    """The boundaries (T, stages) of a packed set, and of each stage the encoder's vectors (T, D): a
    frame has the vector of the stage's last position by then; above stage 1: its chunk's first."""
    known = np.maximum(1, dataset.length - gap)  # how many frames of each episode the model reads
    found = []  # of each episode
    groups = np.array_split(np.arange(len(known)), 1 + len(known) // 32)
    for group in tqdm(groups, f"skills of {dataset.name}", disable=None):
        z = [torch.from_numpy(latents[dataset.start[e] :][: known[e]]) for e in group]
        z = pad_sequence(z, batch_first=True)  # (E, L, latent)
        mask = torch.arange(z.shape[1]) < torch.from_numpy(known[group])[:, None]
        _, routings = model(z.to(device), mask.to(device))
        for i, e in enumerate(group):
            frames, at = np.arange(dataset.length[e]), np.arange(known[e])
            marks, vectors = [], []  # of each stage; at: the frame of each of its positions
            for routing in routings:
                latest = np.searchsorted(at, frames, side="right") - 1  # the last position by then
                vectors.append(routing.vectors[i, latest].cpu().numpy())
                at = at[routing.boundary[i, : len(at)].cpu().numpy()]  # of the next stage's
                marks.append(np.isin(frames, at))
            found.append([np.stack(marks, axis=1), *vectors])
    return [np.concatenate(arrays) for arrays in zip(*found, strict=True)]


def events(phase):
    """Frames where phase (L,), bytes, changes; a grasp or release counts once, at its middle."""
    starts = np.flatnonzero(np.append(True, phase[1:] != phase[:-1])[: len(phase)])
    ends = np.append(starts[1:], len(phase)) - 1  # the last frame of each
    short = np.isin(phase[starts], [b"grasp", b"release"])
    others = starts[1:][~short[1:] & ~short[:-1]]  # between two phases that are long
    return np.sort(np.append((starts + ends)[short] // 2, others))


def f1_score(found, true, slack=2):
    """F1 of boundaries against events, lists of arrays, matched one to one within slack frames."""
    hits = 0
    for boundary, event in zip(found, true, strict=True):
        near = np.abs(boundary[:, None] - event) <= slack
        hits += int(near[linear_sum_assignment(near, maximize=True)].sum())
    return round(2 * hits / max(1, sum(map(len, found)) + sum(map(len, true))), 4)


def peaks(z, count):
    """A control: the count highest peaks of the cosine distance of adjacent latents z (L, D)."""
    cosine = F.cosine_similarity(torch.from_numpy(z[1:]), torch.from_numpy(z[:-1]))
    change = np.pad(1 - cosine.numpy(), 1, constant_values=-1)
    top = find_peaks(change)[0]
    return np.sort(top[np.argsort(-change[top], kind="stable")[:count]])


def boundary_f1(sets, latents, found, even, gap):
    """F1 with the true changes, where known, of a stage's boundaries, uniform ones and peaks."""
    true, cuts = [], {"f1_boundary": [], "f1_uniform": [], "f1_peaks": []}
    for dataset, z, marks, uniform in zip(sets, latents, found, even, strict=True):
        phase = dataset.open("truth_phase")
        for e in [] if phase is None else dataset.split("val"):
            rows = dataset.rows([e], gap)
            true.append(events(phase[rows]))
            cuts["f1_boundary"].append(np.flatnonzero(marks[rows])[1:])  # the first is no merit
            cuts["f1_uniform"].append(np.flatnonzero(uniform[rows])[1:])
            cuts["f1_peaks"].append(peaks(z[rows], len(cuts["f1_boundary"][-1])))
    return {name: f1_score(cut, true) for name, cut in cuts.items()} if true else {}


def skill_r2(dataset, skills, boundary):
    """R2 from skills, held out: of the action, and of its sum to the segment's end (no gripper)."""
    action = np.asarray(dataset.actions, np.float64)
    way, _ = sum_ahead(action[:, : max(1, action.shape[1] - 1)], boundary)
    train, val = dataset.rows(dataset.split("train")), dataset.rows(dataset.split("val"))
    return [ridge(skills[train], y[train], skills[val], y[val]) for y in (action, way)]


def draw(path, sets, boundaries):
    """A held-out video of each set with its boundaries (HiLAM, figure 4)."""
    strip, marks = [], {}
    colours = ["white", "orange", "red", "purple"]  # by how many stages cut there, or at t + 1
    for dataset, b in zip(sets, boundaries, strict=True):
        rows = dataset.rows(dataset.split("val")[:1])[:-1:2]
        for line in np.array_split(rows, max(1, -(-len(rows) // 20))):
            for c, t in enumerate(line):
                marks[len(strip), c] = colours[min(b[t : t + 2].any(0).sum(), 3)]
            strip.append((dataset.name, dataset.frames[line]))
    draw_strip(path, strip, "every second frame; orange: a z1 begins, red: a z2 as well", marks)


def report(args, model, sets, latents, held_out, gap, device):
    """Write boundaries and skills, measure and print what they are worth, draw."""
    found = [segment(model, d, z, gap, device) for d, z in zip(sets, latents, strict=True)]
    boundaries, *vectors = zip(*found, strict=True)  # of each set
    figures = []  # of each stage
    print(f"held-out episodes, N {args.chunk}: F1 with true changes; R2 of what a skill tells:")
    cuts = sum(b[rows].sum(0) for b, rows in zip(boundaries, held_out, strict=True))  # (stages,)
    read = [sum(map(len, held_out)), *cuts[:-1]]  # stage 1 reads frames, stage 2 what 1 cut, ...
    for s, rate in enumerate((cuts / read).tolist()):
        marks = [b[:, s] for b in boundaries]
        even = [uniform_boundaries(b, d.start, d.length) for b, d in zip(marks, sets, strict=True)]
        f1 = boundary_f1(sets, latents, marks, even, gap)
        row = {"rate": round(rate, 4)} | f1
        scores = " · ".join(f"{key[3:]} {value:.2f}" for key, value in f1.items()) or "unknown"
        print(f"  stage {s + 1}: every {1 / rate:.1f} positions, F1 {scores}")
        for dataset, v, found_at, uniform_at in zip(sets, vectors[s], marks, even, strict=True):
            for kind, cut in (("skills", found_at), ("uniform", uniform_at)):
                skill = skill_vectors(v, cut, args.skill, dataset.last)
                write(Path(args.out, f"{kind}{s + 1}.{dataset.name}.npy"), skill)
                if dataset.actions is not None:
                    now, way = skill_r2(dataset, skill, cut)
                    row[f"{kind}.{dataset.name}"] = {"action_r2": now, "segment_end_r2": way}
                    now, way = np.round(now, 2), np.round(way, 2)
                    print(f"    {dataset.name} {kind:7} R2: action {now} · way to its end {way}")
        figures.append(row)
    for dataset, b in zip(sets, boundaries, strict=True):
        write(Path(args.out, f"boundaries.{dataset.name}.npy"), b)
    write(Path(args.out, "skills.json"), {"stages": figures})
    draw(Path(args.out, "skills.png"), sets, boundaries)


def latent_scale(dataset, z, gap):
    """The mean (D,) of a set's training latents, and one deviation for all numbers."""
    known = z[dataset.rows(dataset.split("train"), gap)]
    return known.mean(0), float(known.var(0).mean() ** 0.5) + 1e-6


def read_skills(out, video, like, stage, device):
    """The skills (T, D) of a stage, "skills1" or higher, that a run folder's models find in a new
    packed set, video; its latents are scaled as those of like, a set they were trained on."""
    path = Path(out, "skills.pt")
    record = data.load_checkpoint(path, "skills")
    settings = record["settings"]
    if data.file_checksum(Path(out, "lam.pt")) != settings["lam"]:
        fail(f"{path} learned from another lam.pt than lies beside it")
    lam = load_lam(out, like, device)
    mean, deviation = latent_scale(like, load_rows(like, out, "latents"), lam.gap)
    z = (encode(lam, video, device) - mean) / deviation
    model = HNet(settings, z.shape[1], lam.gap)
    data.load_weights(model, record, path)
    boundaries, *vectors = segment(model.to(device), video, z, lam.gap, device)
    s = int(stage.removeprefix("skills")) - 1
    return skill_vectors(vectors[s], boundaries[:, s], settings["skill"], video.last)


def main():
    args = get_args()
    device, _, world = data.start(args.device)
    if world > 1:
        fail("skills.py runs in one process: start it without torchrun")
    torch.manual_seed(args.seed)
    sets = data.open_sets(args.data)
    raw = [load_rows(dataset, args.out, "latents") for dataset in sets]
    lam = load_lam(args.out, sets[0], device).requires_grad_(False)  # frozen
    scale = [latent_scale(dataset, z, lam.gap) for dataset, z in zip(sets, raw, strict=True)]
    latents = [(z - mean) / deviation for z, (mean, deviation) in zip(raw, scale, strict=True)]
    episodes = [[e for e in d.split("train") if d.length[e] > lam.gap + 1] for d in sets]
    held_out = [dataset.rows(dataset.split("val"), lam.gap + 1) for dataset in sets]
    for d, *both in zip(sets, episodes, held_out, strict=True):
        if min(map(len, both)) == 0:
            fail(f"{d.name} has none of {lam.gap + 2} frames (gap + 2) to train on, or held out")
    model = HNet(vars(args), raw[0].shape[1], lam.gap).to(device)
    if args.chunk[0] < model.stage.limits[0]:
        fail(f"--chunk {args.chunk[0]:g} is below --least, or gap / 2: {model.stage.limits[0]}")
    groups = [{"params": [], "share": share} for share in (*args.slow, 1.0)]  # of the rate
    for name, parameter in model.named_parameters():
        group = 0 if "embed" in name or ".k." in name else 2
        groups[1 if "encoder" in name else group]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01)
    settings = vars(args) | {"lam": data.file_checksum(Path(args.out, "lam.pt"))}
    settings["data"] = [d.checksum() for d in sets] + [data.checksum(z) for z in raw]
    path = Path(args.out, "skills.pt")
    first, log = data.resume(path, "skills", settings, model, optimizer, "skills[0-9].*.npy")
    seen, begin = [], time.time()
    for step in tqdm(range(first, args.steps), "skills", disable=None):
        rng = np.random.default_rng([args.seed, step])  # the batch, the same in a resumed run
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / args.steps)  # from 1 to a twentieth
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * args.lr * cosine * min(1, (step + 1) / 100)
        z, mask, rows = get_batch(sets, latents, episodes, lam.gap, args.batch, rng, device)
        prediction, routings = model(z, mask)
        l_latent = (prediction[:, :-1] - z[:, 1:]).abs()[mask[:, 1:]].mean()  # l1
        l_rec = reconstruction(lam, prediction, mask, rows, sets, scale, rng)
        loss = l_latent + args.rec * l_rec  # lambda_rec
        row = {"step": step + 1, "L_latent": l_latent.item(), "L_rec": l_rec.item()}
        for s, (routing, n) in enumerate(zip(routings, args.chunk, strict=True), 1):
            l_ratio, f, g = ratio_loss(routing.boundary, routing.probability, routing.mask, n)
            loss = loss + args.ratio * l_ratio  # lambda_ratio
            row |= {f"F_z{s}": f.item(), f"G_z{s}": g.item()}
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        data.stop_unless_finite(norm, step, path)
        optimizer.step()
        seen.append(row | {"loss": loss.item()})
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            data.add_to_log(Path(args.out, "skills"), log, seen, first, begin)
            record = {"stage": "skills", "settings": settings, "step": step + 1}
            record |= {"steps": args.steps, "log": log, "model": model.state_dict()}
            write(path, record | {"optimizer": optimizer.state_dict()})
            seen = []
    report(args, model, sets, latents, held_out, lam.gap, device)


if __name__ == "__main__":
    main()
