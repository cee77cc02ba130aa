"""
Stage 2, skill discovery: H-Net dynamic chunking over the latent actions of stage 1.

A stage reads a sequence of vectors, decides where one piece ends and the next begins, and hands only the first vector of each piece to
the stage above it; what comes back is spread over the frames again, and the whole network predicts the next latent action (HiLAM, arXiv
2603.05815, section 3.2; H-Net, arXiv 2507.07955). Two stages by default: primitive skills (reach, carry), then sub-goals.

    h = E(z)                                          encoder, causal, ends in RMSNorm
    p_1 = 1, p_t = (1 - cos(q_{t-1}, k_t)) / 2        boundary probability; b_t = 1 where p_t >= 0.5
    z' = Chunk(h; b)                                  keep the vectors at boundaries
    z = D(DeChunk(M(z'); b, p) * ste(c) + R(h))       main network (again a stage, or at the top a causal transformer), then the decoder
    loss = L_latent + rec * L_rec + ratio * L_ratio   next latent; next frame drawn by the frozen FDM; chunk rate near 1/N

    python skills.py                                  # toy world, about a minute on two CPU cores
    python skills.py --data data/libero_10 --out out/libero_10 --chunk 12 3

Writes OUT/skills.pt, and for every packed set OUT/skills1.SET.npy, skills2.SET.npy (T, width: the skill of every frame) and
OUT/boundaries.SET.npy (T, stages) bool; OUT/skills.json; OUT/skills.png, the film strip of one video with its boundaries.
"""
import time
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
import lam
from data import fail, fingerprint, load_checkpoint, load_weights, open_sets, write
from lam import Block, draw_strip, get_lr, resume, save_checkpoint, setup, stage_parser, step_rng, upright

def get_args(argv=None):
    parser = stage_parser(__doc__, steps=600)
    add = parser.add_argument_group("H-Net").add_argument
    add("--chunk", type=float, nargs="+", default=[15, 3], help="N: target length of a chunk, one number a stage (default: %(default)s)")
    add("--width", type=int, nargs="+", default=[64], help="vector width: one, or one a stage and one on top (default: %(default)s)")
    add("--layers", type=int, default=1, help="blocks in every encoder, decoder and the top network (default: %(default)s)")
    add = parser.add_argument_group("loss and optimizer").add_argument
    add("--rec", type=float, default=0.1, help="weight of the frame reconstruction loss; 0 switches it off (default: %(default)s)")
    add("--ratio", type=float, default=0.1, help="weight of the chunk ratio loss; 0.03 in H-Net (default: %(default)s)")
    add("--slow", type=float, default=0.03, help="learning rate of embedding, encoders and k over that of the rest (default: %(default)s)")
    add("--batch", type=int, default=16, help="episodes a step, shared equally by the sets (default: %(default)s)")
    add("--window", type=int, default=128, help="frames of an episode seen at a time (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default: %(default)s)")
    return parser.parse_args(argv)

# ---------------------------------------------------------------- dynamic chunking
class Routing(NamedTuple):
    """What one stage decided. probability (B, L) float; boundary (B, L) bool; mask (B, L) bool, False on padding; token (B, L, D) = h."""
    probability: torch.Tensor
    boundary: torch.Tensor
    mask: torch.Tensor
    token: torch.Tensor

def ste(c):
    """Straight-through estimator: 1 forward, identity backward (H-Net, eq. 7)."""
    return c + (1 - c).detach()

def route(q, k, mask):
    """Boundary probability and boundaries, (B, L), from q, k (B, L, D) (H-Net, eq. 4). The first position is always one, padding never."""
    p = (1 - F.cosine_similarity(q[:, :-1], k[:, 1:], dim=-1)) / 2
    p = torch.cat([p.new_ones(len(p), 1), p], 1)                                    # (B, L)
    return p, (p >= 0.5) & mask

def chunk(h, boundary):
    """Keep the vectors at boundaries: (B, L, D) -> (B, M, D), mask (B, M), and where each stood (B, M); M = most chunks of a row."""
    count = boundary.sum(1)
    position = (~boundary).int().argsort(dim=1, stable=True)[:, :int(count.max())]      # boundaries first, in order
    mask = torch.arange(position.shape[1], device=h.device) < count[:, None]
    return h.gather(1, position[..., None].expand(-1, -1, h.shape[-1])), mask, position

def dechunk(x, p, boundary, position):
    """Smooth the chunks and spread them over their positions: y_m = (1 - p_m) y_{m-1} + p_m x_m; out_t = y of t's chunk (H-Net, eq. 5, 9).

    x (B, M, D), p and boundary (B, L) -> (B, L, D). The recurrence is a product with the lower-triangular matrix
    W_mn = p_n prod_{j=n+1..m} (1 - p_j), built in log space."""
    p = p.gather(1, position).clamp(1e-4, 1 - 1e-4).float()                         # (B, M)
    s = torch.log1p(-p).cumsum(1)
    w = (s[:, :, None] - s[:, None, :]).tril().exp().tril() * p[:, None, :]
    index = boundary.long().cumsum(1).sub(1).clamp_min(0)
    return (w.to(x.dtype) @ x).gather(1, index[..., None].expand(-1, -1, x.shape[-1]))

def ratio_loss(boundary, p, mask, n):
    """N/(N-1) ((N-1) F G + (1-F)(1-G)) with F the share of boundaries and G the mean probability (H-Net, eq. 10). Returns loss, F, G."""
    f, g = (boundary & mask).sum() / mask.sum(), (p * mask).sum() / mask.sum()
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)), f, g

# ---------------------------------------------------------------- network
class Stage(nn.Module):
    """One H-Net stage around its main network: again a Stage, or at the top a stack of blocks. widths: of this stage and those above."""

    def __init__(self, widths, stages, layers):
        super().__init__()
        d = widths[0]
        blocks = lambda n, width: nn.Sequential(*[Block(width) for _ in range(n)])
        self.encoder, self.decoder = blocks(layers, d).append(nn.RMSNorm(d, elementwise_affine=False)), blocks(layers, d)
        self.q, self.k, self.residual = (nn.Linear(d, d, bias=False) for _ in range(3))
        nn.init.eye_(self.q.weight), nn.init.eye_(self.k.weight), nn.init.zeros_(self.residual.weight)
        self.pad = nn.Parameter(torch.zeros(widths[1] - d)) if widths[1] > d else None     # H-Net widens by appending a learned vector
        self.main = Stage(widths[1:], stages - 1, layers) if stages > 1 else blocks(2 * layers, widths[1])

    def forward(self, x, mask):
        """x (B, L, D), mask (B, L) -> output (B, L, D) and the Routing of this stage and of all above it."""
        h = self.encoder(x)
        p, boundary = route(self.q(h), self.k(h), mask)
        z, inner_mask, position = chunk(h, boundary)
        if self.pad is not None:
            z = torch.cat([z, self.pad.expand(*z.shape[:2], -1)], -1)
        y, above = self.main(z, inner_mask) if isinstance(self.main, Stage) else (self.main(z), [])
        confidence = torch.where(boundary, p, 1 - p)[..., None]
        out = dechunk(y[..., :h.shape[-1]], p, boundary, position) * ste(confidence) + self.residual(h)
        return self.decoder(out), [Routing(p, boundary, mask, h)] + above

class HNet(nn.Module):
    """Standardised latents z (B, L, latent), mask (B, L) -> at t a prediction of z_{t+1}, and the routings of all stages."""

    def __init__(self, latent, widths, stages, layers):
        super().__init__()
        self.embed, self.head = nn.Linear(latent, widths[0], bias=False), nn.Linear(widths[0], latent)
        nn.init.orthogonal_(self.embed.weight)                                      # keeps the angles that the router compares
        self.stage, self.norm = Stage(widths + widths[-1:], stages, layers), nn.RMSNorm(widths[0])

    def forward(self, z, mask):
        y, routings = self.stage(self.embed(z), mask)
        return self.head(self.norm(y)), routings

def frame_rate(routings):
    """Every stage at frame rate: boundaries, list of (B, L) bool, and every frame's skill, list of (B, L, D) (HiLAM: k_t = cumsum b)."""
    boundaries, skills = [], []
    inner = torch.ones_like(routings[0].boundary)                                   # the frames at which this stage has a position
    for r in routings:
        rank = (inner.long().cumsum(1) - 1).clamp_min(0)                            # which position of this stage a frame belongs to
        inner = inner & r.boundary.gather(1, rank)
        begin = torch.where(inner, torch.arange(inner.shape[1], device=inner.device), 0).cummax(1).values     # where its segment began
        boundaries.append(inner)
        skills.append(r.token.gather(1, rank.gather(1, begin)[..., None].expand(-1, -1, r.token.shape[-1])))
    return boundaries, skills

# ---------------------------------------------------------------- data
def load_latents(dataset, out):
    """Latents of a packed set: those stage 1 wrote into out, or latents.npy inside the set, from any other LAM. Returns (T, D) float32."""
    for path in (Path(out, f"latents.{dataset.name}.npy"), dataset.path / "latents.npy"):
        if path.exists():
            z = np.load(path)
            if len(z) != dataset.total or not np.isfinite(z).all():
                fail(f"{path}: {len(z)} latents for {dataset.total} frames, or a NaN among them: run `python lam.py` again")
            return z
    fail(f"no latents for {dataset.path}: run `python lam.py` with the same --data and --out first")

def get_batch(sets, latents, gap, count, window, rng, episodes):
    """Random stretches of episodes: z (B, L, D), mask (B, L), their rows in the packed sets (B, L), and which set each is from (B,)."""
    parts = []
    for i, (dataset, latent) in enumerate(zip(sets, latents)):
        e = rng.choice(episodes[i], -(-count // len(sets)))
        length, t = np.maximum(2, dataset.length[e] - gap)[:, None], np.arange(window)
        t = (rng.random(length.shape) * np.maximum(1, length - window + 1)).astype(int) + t                  # (B, window)
        rows = dataset.start[e][:, None] + np.minimum(t, length - 1)
        parts.append((latent[rows], t < length, rows, np.full(len(e), i)))
    z, mask, rows, source = (np.concatenate(x) for x in zip(*parts))
    longest = mask.sum(1).max()
    return torch.from_numpy(z[:, :longest]), torch.from_numpy(mask[:, :longest]), rows[:, :longest], source

def whole(dataset, latent, episodes, gap, batch=32):
    """All of the given episodes, in padded batches: yields (episodes, z (B, L, D), mask (B, L))."""
    for part in np.array_split(episodes, max(1, len(episodes) // batch)):
        lengths = np.maximum(1, dataset.length[part] - gap)
        t = np.arange(lengths.max())
        rows = dataset.start[part][:, None] + np.minimum(t, lengths[:, None] - 1)
        yield part, torch.from_numpy(latent[rows]), torch.from_numpy(t < lengths[:, None])

def losses(model, fdm, batch, sets, args, scale, rng, device):
    """The three losses of a batch, and F and G of every stage. scale: mean and standard deviation that standardised the latents."""
    z, mask, rows, source = batch
    z, mask = z.to(device), mask.to(device)
    prediction, routings = model(z, mask)
    valid = mask[:, 1:]
    latent = (prediction[:, :-1] - z[:, 1:]).abs()[valid].mean()                    # L_latent, l1
    rec = torch.zeros((), device=device)
    if fdm is not None:                                                             # L_rec at 32 positions: I_{t+1+k} from I_{t+1} and the
        pick = rng.permutation(np.flatnonzero(valid.cpu().numpy()))[:32]            # PREDICTED latent; the frozen FDM passes gradients
        b, t = np.unravel_index(np.sort(pick), valid.shape)                         # sorted: set after set, as in rows
        at = [(s, rows[b, t + 1][source[b] == i]) for i, s in enumerate(sets)]
        now, future = (torch.cat([lam.images(s, r + gap, fdm.wrist, device) for s, r in at]) for gap in (0, fdm.gap))
        rec = lam.ratio(fdm(now, prediction[b, t] * scale[1] + scale[0]), future, now)
    ratios = [ratio_loss(r.boundary, r.probability, r.mask, n) for r, n in zip(routings, args.chunk)]
    total = latent + args.rec * rec + args.ratio * sum(x[0] for x in ratios)
    return total, latent, rec, [(f.item(), g.item()) for _, f, g in ratios]

# ---------------------------------------------------------------- figures
def events(phase, names):
    """Frames at which the true skill changes: the middle of each grasp and of each release, and any other change of phase. phase (L,)."""
    starts = np.flatnonzero(np.diff(phase, prepend=phase[0] - 1))
    ends, out = np.append(starts[1:], len(phase)), []
    short = [names[phase[s]] in ("grasp", "release") for s in starts]
    for i in range(len(starts)):
        if short[i]:
            out.append((starts[i] + ends[i] - 1) // 2)
        elif i and not short[i - 1]:
            out.append(starts[i])
    return np.array(out, int)

def match(found, true, slack=2):
    """Number of true events with a boundary of their own within slack frames, matched in order of time."""
    hits, used = 0, 0
    for t in true:
        while used < len(found) and found[used] < t - slack:
            used += 1
        if used < len(found) and found[used] <= t + slack:
            hits, used = hits + 1, used + 1
    return hits

def f1(pairs):
    """F1 over episodes of (boundaries, events), +-2 frames; the first frame of an episode is a boundary for free and does not count."""
    hits = sum(match(b, e) for b, e in pairs)
    return 2 * hits / max(1, sum(len(b) + len(e) for b, e in pairs))

def peaks(z, count):
    """The count highest local maxima of the cosine dissimilarity of adjacent latents z (L, D): a control that needs no network."""
    n = z / (np.linalg.norm(z, axis=1, keepdims=True) + 1e-6)
    d = np.append(1 - (n[1:] * n[:-1]).sum(1), 0)
    top = [t for t in range(1, len(d) - 1) if d[t] >= d[t - 1] and d[t] > d[t + 1]]
    return np.sort(np.array(sorted(top, key=lambda t: -d[t])[:count], int)) + 1

@torch.no_grad()
def segment(model, dataset, latent, gap, device):
    """Boundaries (T, stages) bool and skills, one (T, D) a stage. The k last frames, which have no latent, stay in the last segment."""
    boundaries, skills = [], []
    for part, z, mask in whole(dataset, latent, np.arange(len(dataset.start)), gap):
        at, skill = frame_rate(model(z.to(device), mask.to(device))[1])
        at = torch.stack(at, -1)
        for i, (length, n) in enumerate(zip(dataset.length[part], mask.sum(1).numpy())):
            t = np.minimum(np.arange(length), n - 1)
            boundaries.append(at[i, t].cpu().numpy() & (np.arange(length) < n)[:, None])
            skills.append([x[i, t].cpu().numpy() for x in skill])
    return np.concatenate(boundaries), [np.concatenate(x) for x in zip(*skills)]

def score(sets, latents, boundaries, skills, gap):
    """Boundary F1 of every stage and of its controls, and NMI of clustered top skills with the true phase, on held-out episodes."""
    keys = ["boundary_f1", "boundary_f1_uniform", "boundary_f1_random", "boundary_f1_peaks"]
    figures, rng = {key: [] for key in keys}, np.random.default_rng(0)
    known = [i for i, dataset in enumerate(sets) if dataset.truth("phase") is not None]
    if not known:
        return dict.fromkeys(keys + ["skill_nmi"])
    for stage in range(boundaries[0].shape[1]):
        pairs = {key: [] for key in keys}
        for i in known:
            for e in sets[i].split("val"):
                r, n = slice(sets[i].start[e], sets[i].start[e] + sets[i].length[e]), sets[i].length[e] - gap
                found = np.flatnonzero(boundaries[i][r, stage])[1:]
                uniform = np.linspace(0, n, len(found) + 2)[1:-1].round().astype(int)
                chance = np.sort(rng.choice(np.arange(1, n), len(found), replace=False))
                for key, control in zip(keys, (found, uniform, chance, peaks(latents[i][r][:n], len(found)))):
                    pairs[key].append((control, events(sets[i].truth("phase")[r], sets[i].phases)))
        for key in keys:
            figures[key].append(f1(pairs[key]))
    rows = [sets[i].rows(sets[i].split("val"), gap) for i in known]
    phase = np.concatenate([sets[i].truth("phase")[r] for i, r in zip(known, rows)])
    top = np.concatenate([skills[i][-1][r] for i, r in zip(known, rows)])
    clusters = KMeans(len(np.unique(phase)), n_init=4, random_state=0).fit_predict(top)
    return figures | dict(skill_nmi=normalized_mutual_info_score(phase, clusters))

@torch.no_grad()
def evaluate(model, fdm, sets, latents, args, scale, gap, device):
    """On held-out episodes: next-latent l1 over copying the last latent, error of the frame drawn from it over copying, chunk rates."""
    l1, copy, frames, rates = 0.0, 0.0, [], []
    for dataset, latent in zip(sets, latents):
        for part, z, mask in whole(dataset, latent, dataset.split("val"), gap):
            z, mask = z.to(device), mask.to(device)
            prediction, routings = model(z, mask)
            valid = mask[:, 1:]
            l1 += (prediction[:, :-1] - z[:, 1:]).abs()[valid].sum().item()
            copy += (z[:, :-1] - z[:, 1:]).abs()[valid].sum().item()
            rates.append([(int(r.boundary.sum()), int(r.mask.sum())) for r in routings])
            if fdm is not None:
                b, t = (x.cpu().numpy()[::8] for x in torch.where(valid))
                now, future = (lam.images(dataset, dataset.start[part][b] + t + 1 + k, fdm.wrist, device) for k in (0, gap))
                frames.append(lam.ratio(fdm(now, prediction[b, t] * scale[1] + scale[0]), future, now).item())
    kept = np.array(rates).sum(0)
    return dict(latent_l1_over_copy=l1 / copy, chunk_rate=(kept[:, 0] / kept[:, 1]).tolist(), target_rate=[1 / n for n in args.chunk],
                frame_error_predicted_latent=float(np.mean(frames)) if frames else None)

def draw(path, sets, boundaries):
    """Film strip of one held-out video a set: stage-1 boundaries framed orange, stage-2 boundaries red (HiLAM, figure 4)."""
    rows, marks = [], {}
    for dataset, b in zip(sets, boundaries):
        e = dataset.split("val")[0]
        for line in np.array_split(np.arange(dataset.start[e], dataset.start[e] + dataset.length[e], 2), 2):
            level = [b[t:t + 2].any(0).sum() for t in line]                         # how many stages cut here
            marks |= {(len(rows), c): ("orange", "red", "purple")[min(n, 3) - 1] for c, n in enumerate(level) if n}
            rows.append((dataset.name, upright(dataset, dataset.frames[line])))
    draw_strip(path, rows, marks)

def main():
    args = get_args()
    if len(args.width) not in (1, len(args.chunk) + 1) or any(n <= 1 for n in args.chunk):
        fail("--width takes one number, or one a stage and one for the top, and every N of --chunk is above 1")
    device, sets = setup(args), open_sets(args.data)
    args.data_checksum = fingerprint(*(raw := [load_latents(s, args.out) for s in sets]))
    fdm, gap, lam_path = None, 0, Path(args.out, "lam.pt")
    if lam_path.exists():
        record = load_checkpoint(lam_path, "lam")
        model = lam.LAM(record["args"], sets[0].frames.shape[1])
        load_weights(model, record, lam_path)
        fdm, gap = model.fdm.to(device).requires_grad_(False), record["args"]["gap"]
        fdm.wrist, fdm.gap = record["args"]["wrist"], gap
    if fdm is None or args.rec == 0:
        print(f"the reconstruction loss is off: {'--rec 0' if fdm else f'no FDM for these latents, {lam_path} is missing'}")
    rows = np.concatenate([z[s.rows(s.split("train"), gap)] for s, z in zip(sets, raw)])
    scale = rows.mean(0), rows.std(0) + 1e-6
    latents = [((z - scale[0]) / scale[1]).astype(np.float32) for z in raw]          # else adjacent latents are parallel and nothing is cut
    scale = [torch.from_numpy(x).float().to(device) for x in scale]
    widths = args.width * (len(args.chunk) + 1) if len(args.width) == 1 else args.width
    model = HNet(raw[0].shape[1], widths, len(args.chunk), args.layers).to(device)
    slow, fast = [], []                      # k stays near the latents; q, free to learn, foretells k: a boundary is where that fails
    for name, p in model.named_parameters():
        (slow if any(part in name for part in ("embed", "encoder", ".k.")) else fast).append(p)
    optimizer = torch.optim.AdamW([dict(params=slow, share=args.slow), dict(params=fast, share=1.0)], lr=args.lr, weight_decay=0.01)
    path, episodes, seen = Path(args.out, "skills.pt"), [[e for e in s.split("train") if s.length[e] > gap + 1] for s in sets], []
    first, begin = resume(path, "skills", args, model, optimizer)
    for step in tqdm(range(first, args.steps), "skills", initial=first, total=args.steps, disable=None):
        rng = step_rng(args.seed, step)
        batch = get_batch(sets, latents, gap, args.batch, args.window, rng, episodes)
        loss, latent, rec, rates = losses(model, fdm if args.rec else None, batch, sets, args, scale, rng, device)
        for group in optimizer.param_groups:
            group["lr"] = group["share"] * get_lr(step, args)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append((latent.item(), rec.item(), *np.ravel(rates)))
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            latent, rec, *fg = np.mean(seen[-args.log_every:], 0)
            shares = "  ".join(f"F{i // 2 + 1} {fg[i]:.3f} G{i // 2 + 1} {fg[i + 1]:.3f}" for i in range(0, len(fg), 2))
            tqdm.write(f"step {step + 1:6d}  latent l1 {latent:.3f}  frame error/copy {rec:.3f}  {shares}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(path, "skills", args, step + 1, model, optimizer, begin)
    boundaries, skills = zip(*[segment(model, s, z, gap, device) for s, z in zip(sets, latents)])
    for dataset, b, s in zip(sets, boundaries, skills):
        write(Path(args.out, f"boundaries.{dataset.name}.npy"), b)
        [write(Path(args.out, f"skills{i + 1}.{dataset.name}.npy"), x) for i, x in enumerate(s)]
    figures = evaluate(model, fdm, sets, latents, args, scale, gap, device) | score(sets, latents, boundaries, skills, gap)
    figures["seconds"] = time.time() - begin
    write(Path(args.out, "skills.json"), figures)
    draw(Path(args.out, "skills.png"), sets, boundaries)
    print("  ".join(f"{k} {np.round(v, 3)}" for k, v in figures.items() if v is not None))

if __name__ == "__main__":
    main()
