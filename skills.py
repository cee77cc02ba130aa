"""
Stage 2, skill discovery: H-Net dynamic chunking over the latent actions of stage 1.

A stage reads a sequence of vectors, decides where one piece ends and the next begins, and hands only the first vector of each piece to
the stage above it; what comes back is spread over the frames again, and the whole network predicts the next latent action (HiLAM, arXiv
2603.05815, section 3.2; H-Net, arXiv 2507.07955). Two stages by default: primitive skills (reach, carry), then sub-goals.

    h = E(z)                                          encoder, causal, ends in RMSNorm
    p_1 = 1, p_t = (1 - cos(q_{t-1}, k_t)) / 2        boundary probability, q of h, k of z; b_t = 1 where p_t >= 0.5
    z' = Chunk(h; b)                                  keep the vectors at boundaries
    z = D(DeChunk(M(z'); b, p) * ste(c) + R(h))       main network (again a stage, or at the top a causal transformer), then the decoder
    loss = L_latent + rec * L_rec + ratio * L_ratio   next latent; next frame drawn by the frozen FDM; chunk rate near 1/N

    python skills.py                                  # toy world, a minute and a half on two CPU cores
    python skills.py --data data/libero_10 --out out/libero_10 --chunk 20 3

Writes OUT/skills.pt, and for every packed set OUT/skills1.SET.npy, skills2.SET.npy (T, width: the skill of every frame),
uniform1.SET.npy ... (the same cut uniformly, a control) and boundaries.SET.npy (T, stages) bool; OUT/skills.json; OUT/skills.png.
"""
import collections, itertools, time
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy.signal import find_peaks
from scipy.sparse import csgraph, csr_matrix
from tqdm import tqdm
from sklearn import cluster, metrics
import lam
from data import RANK, WORLD, fail, fingerprint, load_checkpoint, load_weights, open_sets, write
from lam import Block, descend, draw_strip, pooled, resume, save_checkpoint, setup, stage_parser, step_rng, upright

def get_args(argv=None):
    parser = stage_parser(__doc__, steps=600)
    add = parser.add_argument_group("H-Net").add_argument
    add("--chunk", type=float, nargs="+", default=[15, 3], help="N: target length of a chunk, one number a stage (default: %(default)s)")
    add("--least", type=int, default=5, help="frames in the shortest chunk of stage 1 (default: %(default)s)")
    add("--width", type=int, nargs="+", default=[64], help="vector width: one, or one a stage and one on top (default: %(default)s)")
    add("--layers", type=int, default=4, help="blocks in every encoder, decoder and the top network (default: %(default)s)")
    add = parser.add_argument_group("loss and optimizer").add_argument
    add("--rec", type=float, default=0.1, help="weight of the frame reconstruction loss; 0 switches it off (default: %(default)s)")
    add("--ratio", type=float, default=0.1, help="weight of the chunk ratio loss; 0.03 in H-Net (default: %(default)s)")
    add("--slow", type=float, nargs=2, default=[0.03, 0.3], help="share of --lr: of embedding and k, of encoders (default: %(default)s)")
    add("--batch", type=int, default=16, help="episodes a step, shared equally by the sets (default: %(default)s)")
    add("--window", type=int, default=128, help="frames of an episode seen at a time (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (default: %(default)s)")
    return parser.parse_args(argv)

# ---------------------------------------------------------------- dynamic chunking
# What one stage decided: probability (B, L) float; boundary (B, L) bool; mask (B, L) bool, False on padding; token (B, L, D) = h.
Routing = collections.namedtuple("Routing", "probability boundary mask token")

class Cosine(torch.autograd.Function):
    """cos(q_{t-1}, k_t), from q and k (B, L, D) to (B, L - 1). The gradient by hand reads (B, L, D) half as often as autograd's."""
    @staticmethod
    def forward(ctx, q, k):
        n, m = ((x * x).sum(-1, keepdim=True).clamp_min(1e-16).rsqrt() for x in (q[:, :-1], k[:, 1:]))       # 1 / |q|, 1 / |k|
        ctx.save_for_backward(q, k, n, m, c := (q[:, :-1] * k[:, 1:]).sum(-1, keepdim=True) * n * m)
        return c[..., 0]
    @staticmethod
    def backward(ctx, gradient):                                                    # dc/dq = n m k - c n^2 q, dc/dk = n m q - c m^2 k
        (q, k, n, m, c), g = ctx.saved_tensors, gradient[..., None]
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        torch.mul(k[:, 1:], g * n * m, out=dq[:, :-1]).addcmul_(q[:, :-1], -g * c * n * n)
        torch.mul(q[:, :-1], g * n * m, out=dk[:, 1:]).addcmul_(k[:, 1:], -g * c * m * m)
        return dq, dk

def ste(c):
    """Straight-through estimator: 1 forward, identity backward (H-Net, eq. 7)."""
    return c + (1 - c).detach()
def route(q, k, mask, least=1, apart=1):
    """Boundary probability and boundaries, (B, L), from q, k (B, L, D) (H-Net, eq. 4). The first position is always one, padding never.
    No chunk is shorter than least or apart. apart above 1, where adjacent vectors overlap: k meets q of so many positions before."""
    q = F.pad(q[:, :1 - apart], (0, 0, apart - 1, 0), "replicate") if apart > 1 else q
    p = torch.cat([q.new_ones(len(q), 1), (1 - Cosine.apply(q, k)) / 2], 1)         # (B, L)
    boundary = (p >= 0.5) & mask
    for t in range(1, p.shape[1] if (least := max(least, apart)) > 1 else 0):
        boundary[:, t] &= ~boundary[:, max(0, t - least + 1):t].any(1)
    return p, boundary

def chunk(h, boundary):
    """Keep the vectors at boundaries: (B, L, D) -> (B, M, D), mask (B, M), and where each stood (B, M); M = most chunks of a row."""
    count = boundary.sum(1)
    position = (~boundary).int().argsort(dim=1, stable=True)[:, :int(count.max())]      # boundaries first, in order
    mask = torch.arange(position.shape[1], device=h.device) < count[:, None]
    return h.gather(1, position[..., None].expand(-1, -1, h.shape[-1])), mask, position
def dechunk(x, p, boundary, position):
    """Smooth the chunks and spread them over their positions: y_m = (1 - p_m) y_{m-1} + p_m x_m; out_t = ste(c_t) y of t's chunk, with the
    confidence c_t = p_t at boundaries, 1 - p_t elsewhere (H-Net, eq. 5-9). x (B, M, D), p and boundary (B, L) -> (B, L, D).
    The recurrence is a product with the lower-triangular matrix W_mn = p_n prod_{j=n+1..m} (1 - p_j), built in log space."""
    kept = p.gather(1, position).clamp(1e-4, 1 - 1e-4).float()                      # (B, M)
    s = torch.log1p(-kept).cumsum(1)
    y = ((s[:, :, None] - s[:, None, :]).tril().exp().tril() * kept[:, None, :]).to(x.dtype) @ x              # (B, M, D)
    index = boundary.long().cumsum(1).sub(1).clamp_min(0) + torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    y = F.embedding(index, y.flatten(0, 1))                                         # (B, L, D): every position has its chunk's row
    return y * ste(torch.where(boundary, p, 1 - p))[..., None].to(x.dtype)
def ratio_loss(boundary, p, mask, n):
    """N/(N-1) ((N-1) F G + (1-F)(1-G)) with F the share of boundaries and G the mean probability (H-Net, eq. 10). Returns loss, F, G."""
    count = pooled(mask.sum())
    f, g = pooled((boundary & mask).sum() / count), (p * mask).sum() / count
    return n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g)), f, g

# ---------------------------------------------------------------- network
class Stage(nn.Module):
    """One H-Net stage around its main network: again a Stage, or at the top a stack of blocks. widths: of this stage and those above."""
    def __init__(self, widths, stages, layers, least=1, apart=1):
        super().__init__()
        d, self.least, self.apart, self.every = widths[0], least, apart, 0
        blocks = lambda n, width: nn.Sequential(*[Block(width) for _ in range(n)])
        self.encoder, self.decoder = blocks(layers, d).append(nn.RMSNorm(d, elementwise_affine=False)), blocks(layers, d)
        self.q, self.k, self.residual = (nn.Linear(d, d, bias=False) for _ in range(3))
        nn.init.eye_(self.q.weight), nn.init.eye_(self.k.weight), nn.init.zeros_(self.residual.weight)
        self.pad = nn.Parameter(torch.zeros(widths[1] - d)) if widths[1] > d else None     # H-Net widens by appending a learned vector
        self.main = Stage(widths[1:], stages - 1, layers) if stages > 1 else blocks(2 * layers, widths[1])
    def forward(self, x, mask):
        """x (B, L, D), mask (B, L) -> output (B, L, D) and the Routing of this stage and of all above it."""
        h = self.encoder(x)
        p, boundary = route(self.q(h), self.k(x), mask, self.least, self.apart)      # H-Net has k(h); k(x) is what comes, q(h) foretells it
        if self.every:                                                              # a control: cut uniformly instead
            boundary = mask & (torch.arange(mask.shape[1], device=mask.device) % self.every == 0)
        z, inner_mask, position = chunk(h, boundary)
        z = z if self.pad is None else torch.cat([z, self.pad.expand(*z.shape[:2], -1)], -1)
        y, above = self.main(z, inner_mask) if isinstance(self.main, Stage) else (self.main(z), [])
        out = dechunk(y[..., :h.shape[-1]], p, boundary, position) + self.residual(h)
        return self.decoder(out), [Routing(p, boundary, mask, h)] + above

class HNet(nn.Module):
    """Standardised latents z (B, L, latent), mask (B, L) -> at t a prediction of z_{t+1}, and the routings of all stages."""
    def __init__(self, latent, widths, stages, layers, least=1, gap=1):
        super().__init__()
        self.embed, self.head, self.overlap = nn.Linear(latent, widths[0], bias=False), nn.Linear(widths[0], latent), gap > 1
        nn.init.orthogonal_(self.embed.weight), [nn.init.zeros_(p) for p in self.head.parameters() if self.overlap]    # keeps k's angles
        self.stage, self.norm = Stage(widths + widths[-1:], stages, layers, least, max(1, gap // 2)), nn.RMSNorm(widths[0])
    def forward(self, z, mask):
        y, routings = self.stage(self.embed(z), mask)
        return self.head(self.norm(y)) + z * self.overlap, routings                  # where latents overlap, the next is nearly the last

def frame_rate(routings):
    """Every stage at frame rate: boundaries, list of (B, L) bool, and every frame's skill, list of (B, L, D) (HiLAM: k_t = cumsum b)."""
    boundaries, skills, inner = [], [], torch.ones_like(routings[0].boundary)       # inner: the frames at which this stage has a position
    for r in routings:
        rank = (inner.long().cumsum(1) - 1).clamp_min(0)                            # which position of this stage a frame belongs to
        inner = inner & r.boundary.gather(1, rank)
        begin = torch.where(inner, torch.arange(inner.shape[1], device=inner.device), 0).cummax(1).values     # where its segment began
        boundaries.append(inner)
        skills.append(r.token.gather(1, rank.gather(1, begin)[..., None].expand(-1, -1, r.token.shape[-1])))
    return boundaries, skills

# ---------------------------------------------------------------- data
def load_latents(dataset, out, k=""):
    """Latents (T, D) of a packed set: those stage 1 wrote into out, or latents.npy inside the set, from any other LAM. k: of --shorter."""
    for path in filter(Path.exists, (Path(out, f"latents{k}.{dataset.name}.npy"), dataset.path / f"latents{k}.npy")):
        if len(z := np.load(path)) != dataset.total or not np.isfinite(z).all():
            fail(f"{path}: {len(z)} latents for {dataset.total} frames, or a NaN among them: run `python lam.py` again")
        return z
    fail(f"no latents for {dataset.path}: run `python lam.py` with the same --data and --out first")

def get_batch(sets, latents, gap, count, window, rng, episodes):
    """Random stretches of episodes: z (B, L, D), mask (B, L), their rows in the packed sets (B, L), and which set each is from (B,)."""
    parts = []
    for i, (dataset, latent) in enumerate(zip(sets, latents)):
        length = np.maximum(2, dataset.length[e := rng.choice(episodes[i], WORLD * -(-count // len(sets)))] - gap)[:, None]
        t = (rng.random(length.shape) * np.maximum(1, length - window + 1)).astype(int) + np.arange(window)  # (B, window)
        rows = dataset.start[e][:, None] + np.minimum(t, length - 1)
        parts.append([x[RANK::WORLD] for x in (latent[rows], t < length, rows, np.full(len(e), i))])
    z, mask, rows, source = map(np.concatenate, zip(*parts))
    return torch.from_numpy(z[:, :(longest := mask.sum(1).max())]), torch.from_numpy(mask[:, :longest]), rows[:, :longest], source

def losses(model, fdm, batch, sets, args, scale, rng, device):
    """The loss of a batch; L_latent, L_rec, and F and G of every stage. scale (sets, 2, D): mean and deviation of latents."""
    z, mask, rows, source = *(x.to(device) for x in batch[:2]), *batch[2:]
    (prediction, routings), valid, rec = model(z, mask), mask[:, 1:], torch.zeros((), device=device)
    latent = (prediction[:, :-1] - z[:, 1:]).abs()[valid].mean() * (valid.sum() / pooled(valid.sum()))     # L_latent, l1
    if fdm is not None:                                                             # L_rec at 32 positions: I_{t+1+k} from I_{t+1} and the
        pick = rng.permutation(np.flatnonzero(valid.cpu().numpy()))[:32]            # PREDICTED latent; the frozen FDM passes gradients
        b, t = np.unravel_index(np.sort(pick), valid.shape)                         # sorted: set after set, as in rows
        at = [(s, rows[b, t + 1][source[b] == i]) for i, s in enumerate(sets)]
        now, future = (torch.cat([lam.images(s, r + gap, fdm.wrist, device) for s, r in at]) for gap in (0, fdm.gap))
        rec = lam.ratio(fdm(now, prediction[b, t] * scale[source[b], 1] + scale[source[b], 0]), future, now)
    ratios = [ratio_loss(r.boundary, r.probability, r.mask, n) for r, n in zip(routings, args.chunk)]
    total = latent + args.rec * rec + args.ratio * sum(x[0] for x in ratios)
    return total, pooled(torch.stack([latent.detach(), rec.detach(), *(x.detach() for _, f, g in ratios for x in (f, g))])).tolist()

# ---------------------------------------------------------------- figures
def events(phase, names, gripper=False):
    """Frames at which the true skill changes: the middle of each grasp and release and, if not gripper, other changes. phase (L,)."""
    starts = np.flatnonzero(np.diff(phase, prepend=phase[0] - 1))
    short = np.isin(phase[starts], [names.index("grasp"), names.index("release")])
    keep = short | ~np.append(True, short[:-1]) & (not gripper)     # where a grasp ends is no further event, nor is the first frame
    return np.where(short, (starts + np.append(starts[1:], len(phase)) - 1) // 2, starts)[keep]
def match(found, true, slack=2):
    """Number of true events with a boundary of their own within slack frames: a maximum bipartite matching."""
    near = csr_matrix(np.abs(np.asarray(found, int)[:, None] - np.asarray(true, int)) <= slack)
    return int((csgraph.maximum_bipartite_matching(near) >= 0).sum()) if near.nnz else 0
def f1(pairs):
    """F1 over episodes of (boundaries, events), +-2 frames; the first frame of an episode is a boundary for free and does not count."""
    return 2 * sum(match(b, e) for b, e in pairs) / max(1, sum(len(b) + len(e) for b, e in pairs))
def peaks(z, count):
    """The count highest local maxima of the cosine dissimilarity of adjacent latents z (L, D): a control that needs no network."""
    d = 1 - F.cosine_similarity(torch.from_numpy(z[1:]), torch.from_numpy(z[:-1])).numpy()
    top = find_peaks(np.pad(d, 1, constant_values=-1))[0]           # of the padded d: position t + 1 is between z_t and z_{t+1}
    return np.sort(top[np.argsort(-d[top - 1], kind="stable")[:count]])
def whitening(x):
    """A function that whitens vectors (N, D) by the mean and covariance of x (M, D), axes kept (ZCA): takes away what a body adds."""
    value, axes = np.linalg.eigh(np.cov(x.T, bias=True))
    return lambda v: (v - x.mean(0)) @ (axes * np.maximum(value, 1e-3 * value[-1] + 1e-9) ** -0.5) @ axes.T

@torch.no_grad()
def segment(model, dataset, latent, gap, device, batch=32):
    """All of a packed set, in padded batches of episodes: boundaries (T, stages) bool, skills, one (T, D) a stage, and at t the prediction
    of latent t+1, (T, latent). The k last frames of an episode, which have no latent, stay in the last segment."""
    out = []
    for part in np.array_split(np.arange(len(dataset.start)), max(1, len(dataset.start) // batch)):
        t = np.arange((lengths := np.maximum(1, dataset.length[part] - gap)).max())
        z = torch.from_numpy(latent[dataset.start[part][:, None] + np.minimum(t, lengths[:, None] - 1)])
        prediction, routings = model(z.to(device), torch.from_numpy(t < lengths[:, None]).to(device))
        at, skills = frame_rate(routings)
        arrays = [x.cpu().numpy() for x in (torch.stack(at, -1), prediction, *skills)]
        for i, (n, length) in enumerate(zip(lengths, dataset.length[part])):
            out.append([a[i, np.minimum(np.arange(length), n - 1)] for a in arrays])
            out[-1][0][n:] = False
    boundaries, prediction, *skills = map(np.concatenate, zip(*out))
    return boundaries, skills, prediction

def score(sets, latents, boundaries, skills, gap):
    """Figures of every stage on held-out episodes, lists with one number a stage: boundary F1 and its controls; NMI of clustered skill
    vectors with the true phase; share of segments whose nearest (cosine, whitened) in another episode, in another set, has its phase."""
    keys = [f"{what}_f1{control}" for what in ("boundary", "gripper") for control in ("", "_uniform", "_random", "_peaks")]
    more = ["skill_nmi", "skill_retrieval", "skill_retrieval_other_set"]
    figures, rng, stages = {key: [] for key in keys + more}, np.random.default_rng(0), boundaries[0].shape[1]
    known = [i for i, dataset in enumerate(sets) if dataset.truth("phase") is not None]
    for stage in range(stages if known else 0):
        pairs, pieces, frames = {key: [] for key in keys}, [], []
        white = {i: whitening(skills[i][stage][(r := sets[i].rows(sets[i].split("train"), gap))[boundaries[i][r, stage]]]) for i in known}
        for i, e in [(i, e) for i in known for e in sets[i].split("val")]:
            r = slice(start := sets[i].start[e], start + (n := sets[i].length[e] - gap))
            found, phase = np.flatnonzero(boundaries[i][r, stage]), np.asarray(sets[i].truth("phase")[r])
            uniform, chance = np.linspace(0, n, len(found) + 1)[1:-1].round().astype(int), 1 + rng.choice(n - 1, len(found) - 1, False)
            cuts = found[1:], uniform, chance, peaks(latents[i][r], len(found) - 1)
            true = [events(phase, sets[i].phases, gripper) for gripper in (False, True)]
            [pairs[key].append((cut, event)) for key, (event, cut) in zip(keys, itertools.product(true, cuts))]
            frames.append((vectors := skills[i][stage][r], phase))
            parts = zip(white[i](vectors[found]), found, np.append(found[1:], n))
            pieces += [(v, np.bincount(phase[a:b]).argmax(), 10 ** 6 * i + e, i) for v, a, b in parts]
        [figures[key].append(f1(pairs[key])) for key in keys]
        vectors, phase = map(np.concatenate, zip(*frames))
        clusters = cluster.KMeans(len(np.unique(phase)), n_init=4, random_state=0).fit_predict(vectors)
        figures["skill_nmi"].append(metrics.normalized_mutual_info_score(phase, clusters))
        vectors, labels, episode, name = map(np.array, zip(*pieces))
        n = F.normalize(torch.from_numpy(vectors), dim=1)
        for key, group in zip(more[1:], (episode, name) if len(known) > 1 else (episode,)):
            near = (n @ n.T).masked_fill(torch.from_numpy(group[:, None] == group), -2).argmax(1).numpy()
            figures[key].append(float((labels[near] == labels).mean()))
    return figures if known else dict.fromkeys(figures)

@torch.no_grad()
def evaluate(fdm, sets, latents, boundaries, predictions, args, scale, gap, device):
    """On held-out episodes: next-latent l1 over copying the last latent, error of the frame drawn from it over copying, chunk rates."""
    rows, frames = [s.rows(s.split("val"), gap + 1) for s in sets], []                # those with a next latent
    l1, copy = (sum(np.abs(z[r + 1] - g[r]).sum() for z, g, r in zip(latents, guess, rows)) for guess in (predictions, latents))
    kept = sum(b[s.rows(s.split("val"), gap)].sum(0) for s, b in zip(sets, boundaries))
    total = sum(len(s.rows(s.split("val"), gap)) for s in sets)
    for dataset, prediction, r, (mean, spread) in zip(sets, predictions, rows if fdm else [], scale):
        for part in np.array_split(r[::8], max(1, len(r) // 2048)):
            now, future = (lam.images(dataset, part + 1 + k, fdm.wrist, device) for k in (0, gap))
            frames.append(lam.ratio(fdm(now, torch.from_numpy(prediction[part]).to(device) * spread + mean), future, now).item())
    return dict(latent_l1_over_copy=float(l1 / copy), frame_error_predicted_latent=float(np.mean(frames)) if frames else None,
                chunk_rate=(kept / np.append(total, kept[:-1])).tolist(), target_rate=[1 / n for n in args.chunk])

@torch.no_grad()
def rollout(model, fdm, sets, latents, scale, device, seen=24, jumps=8):
    """Recursion on held-out videos (HiLAM, figure 5): after `seen` true latents each is predicted from predicted ones, a frame drawn from
    a drawn one. Returns the errors of frames 1 .. jumps (k apart) over copying the last one known, and rows for draw()."""
    rows, errors, last = [], [], seen - 1 + fdm.gap                                 # the newest frame that the true latents know
    for dataset, latent, (mean, spread) in zip(sets, latents, scale):
        if not len(start := dataset.start[e := dataset.split("val")][dataset.length[e] > last + jumps * fdm.gap]):
            continue
        z = torch.from_numpy(latent[start[:, None] + np.arange(seen)]).to(device)   # (E, seen, D), then longer and longer
        while z.shape[1] <= last + (jumps - 1) * fdm.gap:
            z = torch.cat([z, model(z, torch.ones_like(z[..., 0], dtype=torch.bool))[0][:, -1:]], 1)
        true = [lam.images(dataset, start + last + j * fdm.gap, fdm.wrist, device) for j in range(jumps + 1)]
        drawn = true[:1]
        for j in range(jumps):
            drawn.append(fdm(drawn[-1], z[:, last + j * fdm.gap] * spread + mean).clamp(0, 1))
        errors.append([lam.ratio(a, b, true[0]).item() for a, b in zip(drawn[1:], true[1:])])
        show = lambda x: upright(dataset, torch.stack(x)[:, 0, :3].mul(255).byte().permute(0, 2, 3, 1).cpu().numpy())
        rows += [(f"{dataset.name}, true", show(true)), (f"{dataset.name}, predicted", show(drawn))]
    return (np.mean(errors, 0).tolist() if errors else None), rows

def draw(path, sets, boundaries, more):
    """Film strip of a held-out video a set: stage-1 boundaries framed orange, stage-2 red (HiLAM, figure 4); below, rows of rollout()."""
    rows, marks = [], {}
    for dataset, b in zip(sets, boundaries):
        for line in np.array_split(dataset.rows([e := dataset.split("val")[0]])[::2], -(-dataset.length[e] // 32)):
            level = [b[t:t + 2].any(0).sum() for t in line]                         # how many stages cut here
            marks |= {(len(rows), c): ("orange", "red", "purple")[min(n, 3) - 1] for c, n in enumerate(level) if n}
            rows.append((dataset.name, upright(dataset, dataset.frames[line])))
    draw_strip(path, rows + more, marks)

def main():
    args = get_args()
    len(args.width) in (1, len(args.chunk) + 1) and min(args.chunk) > 1 or fail("--width: 1 number or 1 more than stages; --chunk: above 1")
    device, sets = setup(args), open_sets(args.data)
    args.data_checksum = fingerprint(*(raw := [load_latents(s, args.out) for s in sets]))
    fdm, gap, lam_path = None, 0, Path(args.out, "lam.pt")
    if lam_path.exists():
        record = load_checkpoint(lam_path, "lam")
        load_weights(model := lam.LAM(record["args"], sets[0].frames.shape[1]), record, lam_path)
        fdm, gap = model.fdm.to(device).requires_grad_(False), record["args"]["gap"]
        fdm.wrist, fdm.gap = record["args"]["wrist"], gap
    fdm and args.rec or print(f"the reconstruction loss is off: {'--rec 0' if fdm else f'no FDM for these latents, {lam_path} is missing'}")
    used = [z[s.rows(s.split("train"), gap)] for s, z in zip(sets, raw)]            # else adjacent latents are parallel: no cuts
    scale = np.stack([[z.mean(0), np.full(z.shape[1], z.var(0).mean() ** 0.5 + 1e-6)] for z in used]).astype(np.float32)
    latents, scale = [((z - m) / d).astype(np.float32) for z, (m, d) in zip(raw, scale)], torch.from_numpy(scale).to(device)
    widths = args.width * (len(args.chunk) + 1) if len(args.width) == 1 else args.width
    model = HNet(raw[0].shape[1], widths, len(args.chunk), args.layers, args.least, gap).to(device)
    # k stays near the latents; q and, less freely, the encoders learn to foretell it. A boundary is where that fails.
    share = lambda name: args.slow[0] if "embed" in name or ".k." in name else args.slow[1] if "encoder" in name else 1.0
    groups = [dict(params=[p for n, p in model.named_parameters() if share(n) == f], share=f) for f in sorted({*args.slow, 1.0})]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.01)
    path, episodes, seen = Path(args.out, "skills.pt"), [[e for e in s.split("train") if s.length[e] > gap + 1] for s in sets], []
    first, begin = resume(path, "skills", args, model, optimizer)
    for step in tqdm(range(first, args.steps), "skills", initial=first, total=args.steps, disable=None):
        rng = step_rng(args.seed, step)
        batch = get_batch(sets, latents, gap, args.batch, args.window, rng, episodes)
        loss, means = losses(model, fdm if args.rec else None, batch, sets, args, scale, rng, device)
        descend(loss, optimizer, step, args), seen.append(means)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            latent, rec, *fg = np.mean(seen[-args.log_every:], 0)
            shares = "  ".join(f"F{i // 2 + 1} {fg[i]:.3f} G{i // 2 + 1} {fg[i + 1]:.3f}" for i in range(0, len(fg), 2))
            tqdm.write(f"step {step + 1:6d}  latent l1 {latent:.3f}  frame error/copy {rec:.3f}  {shares}")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(path, "skills", args, step + 1, model, optimizer, begin)
    boundaries, skills, predictions = zip(*[segment(model, s, z, gap, device) for s, z in zip(sets, latents)])
    errors, more = rollout(model, fdm, sets, latents, scale, device) if fdm else (None, [])
    stage, n = model.stage, np.maximum(1, np.concatenate([s.length for s in sets]) - gap)
    for found in sum(b.sum(0) for b in boundaries):                                 # for policy.py --control uniform: about as many pieces
        stage.every, stage, n = (x := min(range(1, 1 + n.max()), key=lambda x: abs(sum(-(-n // x)) - found))), stage.main, -(-n // x)
    for dataset, z, b, s in zip(sets, latents, boundaries, skills):
        arrays = {"skills": s, "uniform": segment(model, dataset, z, gap, device)[1]}.items()
        arrays = {f"{key}{i + 1}": x for key, stages in arrays for i, x in enumerate(stages)} | dict(boundaries=b)
        [write(Path(args.out, f"{key}.{dataset.name}.npy"), x) for key, x in arrays.items()]
    figures = evaluate(fdm, sets, latents, boundaries, predictions, args, scale, gap, device) | dict(rollout_error=errors)
    figures |= score(sets, latents, boundaries, skills, gap) | dict(seconds=time.time() - begin)
    write(Path(args.out, "skills.json"), figures), draw(Path(args.out, "skills.png"), sets, boundaries, more)
    print("  ".join(f"{k} {np.round(v, 3)}" for k, v in figures.items() if v is not None))

if __name__ == "__main__":
    main()
