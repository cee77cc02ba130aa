"""
Stage 1, the latent action model: from two frames of action-free video to the action between them.

An inverse dynamics model (IDM) sees frames t and t+k and gives a small vector, the latent action z_t = f(I_t, I_{t+k}). A forward dynamics
model (FDM) sees frame t and z_t and must draw frame t+k: I_{t+k} ~ g(I_t, z_t). Trained together on nothing but that drawing, z has to say
what moved (HiLAM, arXiv 2603.05815, section 3.1; UniSkill, CoRL 2025). Two ways to fail are measured below: a z that is ignored, and a z
that carries the future frame instead of the motion.

    python lam.py                                                    # toy world, about 3 minutes on two CPU cores
    python lam.py --data data/libero_10 --out out/libero_10 --gap 8 --latent 128 --wrist --reverse --odd --warp 0.4 --lr 2e-3
Writes OUT/lam.pt, OUT/latents.SET.npy (T, latent) for every packed set, OUT/lam.json and OUT/lam.png.
Expect on the toy world: FDM error near 0.13 of copying the current frame with the true latent, above 1.2 with a shuffled one, 0.9 at zero.
"""
import argparse, os, random, sys, time
from pathlib import Path
import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed, nn
from scipy.stats import entropy
from sklearn import linear_model, metrics, pipeline, preprocessing
from tqdm import tqdm
from PIL import Image, ImageDraw, ImageOps
from data import RANK, TOY_SETS, WORLD, fail, fingerprint, load_checkpoint, load_weights, open_sets, write

# ---------------------------------------------------------------- what the training scripts share
def stage_parser(doc, steps):
    """Parser with the flags every stage has. doc: the script's docstring, which --help shows; steps: default number of training steps."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument_group("run").add_argument
    add("--data", nargs="+", default=TOY_SETS, help="packed datasets (default: the toy world's two, packed on first use)")
    add("--out", default="out/toy", help="run folder, one for all stages (default: %(default)s)")
    add("--steps", type=int, default=steps, help="training steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of weights and batches; same seed, same result (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    add("--log-every", type=int, default=100, help="steps between two lines of log (default: %(default)s)")
    add("--save-every", type=int, default=500, help="steps between two checkpoints (default: %(default)s)")
    return parser

def setup(args, zero=""):
    """Seed all, make the run folder, return the torch.device. Exits without the GPU asked for or at a number too small; zero may be 0."""
    for key, v in ((key, v) for key, value in vars(args).items() for v in np.atleast_1d(value).tolist()):
        if type(v) in (int, float) and not (v > 0 or not v and key in f"{zero} seed rec ratio settle tasks demos warp clear".split()):
            fail(f"--{key.replace('_', '-')} {v}: too small a number")
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    name = args.device.replace("auto", (gpus[int(os.environ.get("LOCAL_RANK", 0)):] + ["cpu"])[0])
    name in ["cpu", *gpus, *["cuda"] * len(gpus)] or fail(f"--device {args.device}: no such device here; use --device cpu")
    if WORLD > 1 and not distributed.is_initialized():                   # torchrun --nproc-per-node 4 lam.py: each takes --batch
        distributed.init_process_group("nccl" if "cuda" in name else "gloo", device_id=torch.device(name) if "cuda" in name else None)
        sys.stdout, sys.stderr = [open(os.devnull, "w")] * 2 if RANK else [sys.stdout, sys.stderr]
    random.seed(args.seed), np.random.seed(args.seed), torch.manual_seed(args.seed)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out {args.out}: no folder can be made there ({error.strerror})")
    return torch.device(name)

def step_rng(seed, step):
    """Numpy generator of one step; torch is seeded alike. Chance depends on (seed, step) alone, so a resumed run repeats itself exactly."""
    torch.manual_seed(seed * 1_000_003 + step + 999_983 * RANK)
    return np.random.default_rng([seed, step])
def pooled(x):
    """Mean of a tensor over the processes that torchrun started, without its gradient; x itself where there is but one."""
    if WORLD > 1:
        distributed.all_reduce(x := x.detach().float() / WORLD)
    return x

def descend(loss, optimizer, step, args):
    """One optimizer step. Learning rate: warm-up over 100 steps, then a cosine to a tenth (as in nanoGPT), times a group's own share."""
    lr = args.lr * min(1.0, (step + 1) / 100) * (0.55 + 0.45 * np.cos(np.pi * min(1.0, step / max(1, args.steps))))
    [group.update(lr=float(group.get("share", 1.0) * lr)) for group in optimizer.param_groups]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    used = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    [p.grad.copy_(pooled(p.grad)) for p in used if WORLD > 1]
    nn.utils.clip_grad_norm_(used, 1.0)
    optimizer.step()
def save_checkpoint(path, stage, args, step, model, optimizer, begin, **more):
    record = dict(stage=stage, args=vars(args), step=step, model=model.state_dict(), optimizer=optimizer.state_dict())
    write(path, record | dict(seconds=time.time() - begin) | more)

def resume(path, stage, args, model, optimizer):
    """Where to start: (0, now), or where the checkpoint at path stopped, its weights and optimizer loaded: (step, now - seconds spent)."""
    if not Path(path).exists():
        return 0, time.time()
    record = load_checkpoint(path, stage, finished=False)
    for key in sorted(set(vars(args)) - {"out", "device", "log_every", "save_every", "suffix"}):       # those that change what is learned
        if record["args"].get(key) != vars(args)[key]:
            fail(f"{path} was trained with {key} {record['args'].get(key)}, not {vars(args)[key]}: choose another --out or delete it")
    load_weights(model, record, path)
    optimizer.load_state_dict(record["optimizer"])
    print(f"{path}: trained already" if record["step"] >= args.steps else f"{path}: resuming at step {record['step']}")
    return record["step"], time.time() - record["seconds"]
def upright(dataset, frames):                                            # for people to look at: LIBERO's are stored upside down
    return [np.ascontiguousarray(f[::-1] if dataset.upside_down else f) for f in frames]
def draw_strip(path, rows, marks={}):
    """Save rows of frames as one PNG. rows: list of (label, list of (H, W, 3) uint8); marks: {(row, column): colour of its frame}."""
    side = max(1, 96 // rows[0][1][0].shape[0]) * rows[0][1][0].shape[0] + 6
    left = 8 + 6 * max(len(label) for label, _ in rows)
    canvas = Image.new("RGB", (left + side * max(len(frames) for _, frames in rows), side * len(rows)), "white")
    for r, (label, frames) in enumerate(rows):
        ImageDraw.Draw(canvas).text((4, r * side + side // 2 - 6), label, fill="black")
        for c, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((side - 6, side - 6), Image.NEAREST)
            canvas.paste(ImageOps.expand(picture, 3, marks.get((r, c), "white")), (left + c * side, r * side))
    write(path, canvas)

def get_args(argv=None):
    parser = stage_parser(__doc__, steps=1500)
    add = parser.add_argument_group("latent action, model and optimizer").add_argument
    add("--gap", type=int, default=1, help="k: frames between the two that the IDM sees (default: %(default)s; UniSkill on LIBERO: 20-40)")
    add("--shorter", type=int, nargs="+", metavar="K", help="learn shorter gaps too, in equal shares: they time actions better (policy.py)")
    add("--latent", type=int, default=8, help="width of the latent action; UniSkill: 64 (default: %(default)s)")
    add("--bottleneck", choices=["plain", "noise"], default="plain", help="noise adds N(0, 0.1) to z in training (default: %(default)s)")
    add("--wrist", action="store_true", help="the models also see and draw the wrist camera")
    add("--reverse", action="store_true", help="show half of the pairs backwards: the FDM cannot guess the motion from habit")
    add("--odd", action="store_true", help="half of z changes its sign when time runs backwards: motion, and nothing that stands still")
    add("--warp", type=float, default=0.0, help="strength of random affine maps of what the IDM sees, 0.4 for cameras that differ")
    add("--width", type=int, default=32, help="channels of the first convolution; doubled twice (default: %(default)s)")
    add("--batch", type=int, default=64, help="frame pairs a step, shared equally by the sets (default: %(default)s)")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe (autocast): for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: a minute at the start, faster steps after it on GPUs")
    add("--lr", type=float, default=4e-3, help="peak learning rate of AdamW (default: %(default)s)")
    return parser.parse_args(argv)

# ---------------------------------------------------------------- models
class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, optional FiLM by a condition vector, SiLU. (B, cin, H, W) -> (B, cout, H/stride, W/stride)."""
    def __init__(self, cin, cout, stride=1, condition=0):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(cin, cout, 3, stride, 1), nn.GroupNorm(8, cout)
        self.film = nn.Linear(condition, 2 * cout) if condition else None
    def forward(self, x, condition=None):
        x = self.norm(self.conv(x))
        if self.film is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, 1)
            x = x * (1 + scale) + shift
        return F.silu(x)

class Block(nn.Module):
    """Pre-norm causal transformer block, (B, L, D) -> (B, L, D); attention fades with distance (ALiBi). It starts as the identity."""
    def __init__(self, width, heads=4):
        super().__init__()
        self.heads, self.norm1, self.norm2 = heads, nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width, bias=False))
        nn.init.zeros_(self.proj.weight), nn.init.zeros_(self.mlp[2].weight)        # so that the router first sees the latents as they are
    def forward(self, x):
        b, l, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, l, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        ago = torch.arange(l, device=x.device)[:, None] - torch.arange(l, device=x.device)
        bias = (-0.5 ** torch.arange(1, self.heads + 1, device=x.device)[:, None, None] * ago).masked_fill(ago < 0, -torch.inf).to(q.dtype)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, bias[None]).transpose(1, 2).reshape(b, l, d))
        return x + self.mlp(self.norm2(x))

class Moments(nn.Module):
    """Mean and first moments over the image, (B, C, H, W) -> (B, 3 C): what moves, and where it does."""
    def forward(self, x):
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        return torch.cat([x.mean((2, 3)), (x.mean(2) * line).mean(-1), (x.mean(3) * line).mean(-1)], 1)
class IDM(nn.Module):
    """Inverse dynamics: z = f(I_t, I_{t+k}), (B, C, S, S) twice -> (B, latent). Frames become a 16 x 16 grid of
    patches, averaged at the end: one motion, one z, anywhere. Of 64, 96, 128 ... pixels: 32 x 32, and first moments beside the averages."""
    def __init__(self, channels, size, latent, width, odd=False):
        super().__init__()
        fine = size > 32 and size % 32 == 0
        grid, last, pool = (32, 4 * width, [Moments()]) if fine else (16, 2 * width, [nn.AdaptiveAvgPool2d(1), nn.Flatten()])
        self.patch, self.odd = size // grid, latent // 2 * bool(odd)
        self.body = nn.Sequential(ConvBlock(2 * channels * self.patch ** 2, width), ConvBlock(width, 2 * width, 2),
                                  ConvBlock(2 * width, 4 * width, 2), ConvBlock(4 * width, last), *pool,
                                  nn.Linear(last * (1 + 2 * fine), latent))
    def forward(self, now, future):
        see = lambda a, b: self.body(F.pixel_unshuffle(torch.cat([a - 0.5, 4 * (b - a)], 1), self.patch))
        z, n = see(now, future), self.odd
        free = F.layer_norm(z[:, n:], z[0, n:].shape)                    # UniSkill: the latent action is LayerNorm'ed, no VQ
        moved = (z - see(future, now))[:, :n] if n else None             # z(a, b) = -z(b, a); eps 1, so that it is small at rest
        return torch.cat([F.layer_norm(moved, (n,), eps=1.0), free], 1) if n else free

class FDM(nn.Module):
    """Forward dynamics: I_{t+k} = I_t + g(I_t, z), a U-Net with FiLM by z at every scale. FiLM at the bottleneck alone leaves z ignored."""
    def __init__(self, channels, size, latent, width):
        super().__init__()
        self.patch, c = size // 16, channels * (size // 16) ** 2
        self.embed = nn.Linear(latent, 4 * width)                        # no SiLU: FiLM linear in z keeps z nearer to linear in the motion
        self.down = nn.ModuleList([ConvBlock(c, width), ConvBlock(width, 2 * width, 2), ConvBlock(2 * width, 4 * width, 2)])
        self.middle = ConvBlock(4 * width, 4 * width, 1, 4 * width)
        self.up = nn.ModuleList([ConvBlock(6 * width, 2 * width, 1, 4 * width), ConvBlock(3 * width, width, 1, 4 * width)])
        self.last = ConvBlock(width, width, 1, 4 * width)
        self.out = nn.Conv2d(width, c, 3, 1, 1)
        nn.init.zeros_(self.out.weight), nn.init.zeros_(self.out.bias)   # at the start the prediction is the current frame
    def forward(self, now, z):
        z, x, skips = self.embed(z), F.pixel_unshuffle(now - 0.5, self.patch), []
        for block in self.down:
            skips.append(x := block(x))                                  # 16 x 16, 8 x 8, 4 x 4
        x = self.middle(x, z)
        for block, skip in zip(self.up, skips[1::-1]):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), skip], 1), z)
        return now + 0.1 * F.pixel_shuffle(self.out(self.last(x, z)), self.patch)      # 0.1: changes are small, steps too

class LAM(nn.Module):
    """The IDM and the FDM that these arguments (a dict) describe, for square frames of this size."""
    def __init__(self, args, size):
        super().__init__()
        size % 16 == 0 or fail(f"frames of {size} pixels make no 16 x 16 patches: pack them at a multiple of 16 (--size)")
        shape = 6 if args["wrist"] else 3, size, args["latent"], args["width"]
        self.idm, self.fdm = IDM(*shape, args.get("odd")), FDM(*shape)
def images(dataset, rows, wrist, device):
    """Rows of a packed dataset -> (B, 3, S, S) in [0, 1], with the wrist camera (B, 6, S, S); one vectorised gather."""
    wrist and dataset.wrist is None and fail(f"{dataset.path} has no wrist camera: leave --wrist out")
    x = np.concatenate([dataset.frames[rows], dataset.wrist[rows]], -1) if wrist else dataset.frames[rows]
    return torch.from_numpy(x).to(device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
def get_batch(sets, index, args, rng, device):
    """Frames t and t+k, (B, C, S, S) each, and where each k is, a list. All sets give equal shares. --reverse swaps every other pair."""
    rows = [rng.choice(i, WORLD * -(-args.batch // len(sets)))[RANK::WORLD] for i in index]
    gaps = np.resize(np.repeat([args.gap, *(args.shorter or [])], 2), len(rows[0]))        # two and two: forwards and backwards
    early, late = (gaps * (np.arange(len(gaps)) % 2 * args.reverse == i) for i in (1, 0))
    frames = [torch.cat([images(s, r + gap, args.wrist, device) for s, r in zip(sets, rows)]) for gap in (early, late)]
    return *frames, [np.flatnonzero(np.tile(gaps, len(sets)) == k) for k in np.unique(gaps)] if args.shorter else [slice(None)]
def warp(frames, amount):
    """A list of frames, each (B, C, S, S), under one random affine map a sample and camera: motion's code must not hang on the view."""
    shape = frames[0].shape[0] * frames[0].shape[1] // 3, 3, *frames[0].shape[2:]          # cameras apart
    turn, shift = torch.randn(shape[0], 2, 2).clamp(-2, 2) / 2, torch.rand(shape[0], 2, 1) - 0.5
    grid = F.affine_grid(torch.cat([torch.eye(2) + amount * turn, amount * shift], 2).to(frames[0].device), shape, False)
    return [F.grid_sample(x.reshape(shape), grid, "bilinear", "border", False).view_as(x) for x in frames]
def ratio(prediction, future, now):
    """Squared error in units of the error of copying the current frame: 0 is perfect, 1 is what no model at all reaches."""
    return F.mse_loss(prediction, future) / pooled(F.mse_loss(now, future)).clamp_min(1e-8)

# ---------------------------------------------------------------- what the latent is worth
def ridge(x, y, x_test, y_test):
    """R^2 per column of y_test, predicted linearly from x_test by ridge regression fitted on (x, y)."""
    model = pipeline.make_pipeline(preprocessing.StandardScaler(), linear_model.Ridge())
    return metrics.r2_score(y_test, model.fit(x, y).predict(x_test), multioutput="raw_values")
def gripper_events(dataset, rows, gap):
    """-1 where the gripper closes between t and t+k by 5 % of its whole way or more, 1 where it opens, else 0, (B,); None if unknown."""
    if dataset.truth("motion") is not None:
        change = sum(dataset.truth("motion")[rows + i, 2] for i in range(gap))
    elif dataset.proprio is not None and dataset.proprio.shape[1] == 9:  # LIBERO's: seven joints, two fingers
        opening = dataset.proprio[:, -2] - dataset.proprio[:, -1]
        change = (opening[rows + gap] - opening[rows]) / max(np.ptp(opening), 1e-6)
    else:
        return None
    return np.sign(change) * (np.abs(change) > 0.05)

def probe(sets, latents, gap):
    """What probes, fitted on training episodes, read from held-out latents. The only place where this stage opens actions.
    action_r2: R^2 of the true actions, summed over the gap. gripper_f1: of "closes" and "opens", frame by frame. transfer_r2: R^2 of the
    last set's true dx, dy by a probe fitted on the first set (hand to robot). layout_r2, layout_r2_random: R^2 of where the blocks are that
    stand still, from the latent and from a random vector; a latent that knows it has copied the frame."""
    found = {key: [] for key in ("action_r2", "gripper_f1", "layout_r2", "layout_r2_random")}
    summed = lambda array, rows: sum(np.asarray(array[rows + i], np.float64) for i in range(gap))
    for dataset, z in zip(sets, latents):
        train, val = (dataset.rows(dataset.split(name), gap) for name in ("train", "val"))
        actions, layout = dataset.truth("actions") if "truth_actions" in dataset.arrays else dataset.actions, dataset.truth("layout")
        if actions is not None:
            found["action_r2"].append(ridge(z[train], summed(actions, train), z[val], summed(actions, val)))
        grip = [gripper_events(dataset, rows, gap) for rows in (train, val)]
        if grip[0] is not None and len(np.unique(grip[0])) == 3:
            guess = linear_model.LogisticRegression(max_iter=500).fit(z[train], grip[0]).predict(z[val])
            found["gripper_f1"].append(metrics.f1_score(grip[1], guess, labels=[-1, 1], average="macro"))
        if layout is not None:
            for key, x in (("layout_r2", z), ("layout_r2_random", np.random.default_rng(0).standard_normal(z.shape))):
                for d in range(8):                                       # x and y of each block, over the frames in which it stands still
                    still = [rows[layout[rows, d] == layout[rows + gap, d]] for rows in (train, val)]
                    found[key].append(ridge(x[still[0]], layout[still[0], d:d + 1], x[still[1]], layout[still[1], d:d + 1]))
    figures = {key: float(np.mean(value)) if value else None for key, value in found.items()}
    figures |= dict(action_r2=np.mean(found["action_r2"] or [[]], 0).tolist(), action_r2_mean=figures["action_r2"])
    a, b = sets[0], sets[-1]
    if len(sets) > 1 and a.truth("motion") is not None and b.truth("motion") is not None:
        i, j = a.rows(a.split("train"), gap), b.rows(b.split("val"), gap)
        motion = [summed(d.truth("motion"), rows)[:, :2] for d, rows in ((a, i), (b, j))]
        figures["transfer_r2"] = ridge(latents[0][i], motion[0], latents[-1][j], motion[1]).tolist()
    return figures

@torch.no_grad()
def encode(model, dataset, gap, args, device, batch=256):
    """Latents of every row, (T, latent) float32; zeros for the last k frames of an episode, which have no frame t+k."""
    out, rows = np.zeros((dataset.total, args.latent), np.float32), dataset.rows(np.arange(len(dataset.start)), gap)
    for part in tqdm(np.array_split(rows, max(1, len(rows) // batch)), f"latents {dataset.name}", disable=None):
        out[part] = model.idm(images(dataset, part, args.wrist, device), images(dataset, part + gap, args.wrist, device)).cpu().numpy()
    return out
@torch.no_grad()
def evaluate(model, sets, latents, args, device):
    """Figures on held-out episodes."""
    rng, errors = np.random.default_rng(0), {s.name: [] for s in sets}
    for dataset, z in zip(sets, latents):
        rows = rng.permutation(dataset.rows(dataset.split("val"), args.gap))[:1024]
        tried = z[rows], z[rng.permutation(rows)], np.zeros_like(z[rows])
        for part in np.array_split(np.arange(len(rows)), max(1, len(rows) // 256)):
            now, future = (images(dataset, rows[part] + gap, args.wrist, device) for gap in (0, args.gap))
            errors[dataset.name].append([float(ratio(model.fdm(now, torch.from_numpy(v[part]).to(device)), future, now)) for v in tried])
    errors = {name: np.mean(error, 0).tolist() for name, error in errors.items()}
    figures = dict(zip(("fdm_error", "fdm_error_shuffled", "fdm_error_zero"), np.mean([*errors.values()], 0).tolist()))
    z = np.concatenate([z[d.rows(d.split("val"), args.gap)] for d, z in zip(sets, latents)])
    figures |= probe(sets, latents, args.gap) | dict(fdm_error_by_set={name: error[0] for name, error in errors.items()})
    return figures | dict(effective_rank=float(np.exp(entropy(np.linalg.eigvalsh(np.cov(z.T)).clip(1e-12)))))     # Roy and Vetterli 2007

@torch.no_grad()
def draw(path, model, sets, latents, args, device):
    """The film strip: frames, true next frames, and the FDM's with the true, a shuffled and a zero latent; then hand to robot transfer."""
    show = lambda d, x: upright(d, (x[:, :3].clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).cpu().numpy())
    strip, motions, rng = [], [], np.random.default_rng(1)
    for dataset, z in zip(sets, latents):
        rows = np.sort(rng.choice(dataset.rows(dataset.split("val"), args.gap), 8))
        now, future = (images(dataset, rows + gap, args.wrist, device) for gap in (0, args.gap))
        motions.append((true := torch.from_numpy(z[rows]).to(device))[:1])
        strip += [(f"{dataset.name} t", show(dataset, now)), (f"t+{args.gap}", show(dataset, future))]
        for name, v in dict(true=true, shuffled=true.roll(1, 0), zero=true * 0).items():
            strip.append((f"FDM, {name} z", show(dataset, model.fdm(now, v))))
    last = f"{sets[0].name}'s first z, {dataset.name}", show(dataset, model.fdm(now, motions[0].expand(8, -1)))     # applied to all frames
    draw_strip(path, strip + [last] * (len(sets) > 1))

def main():
    args = get_args()
    device, sets, path = setup(args), open_sets(args.data), Path(args.out, "lam.pt")
    args.data_checksum = fingerprint(*[s.frames for s in sets])
    index = [s.rows(s.split("train"), args.gap) for s in sets]
    max(args.shorter or [0]) < args.gap or fail(f"--shorter {max(args.shorter)}: not shorter than --gap {args.gap}")
    all(map(len, index)) or fail(f"--gap {args.gap} is longer than every episode of a set")
    model = LAM(vars(args), sets[0].frames.shape[1]).to(device, memory_format=torch.channels_last)     # twice as fast on CPU
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    args.compile and (model.idm.compile(), model.fdm.compile())
    (first, begin), loading, seen = resume(path, "lam", args, model, optimizer), 0.0, []
    for step in tqdm(range(first, args.steps), "lam", initial=first, total=args.steps, disable=None):
        mark, rng = time.time(), step_rng(args.seed, step)
        now, future, parts = get_batch(sets, index, args, rng, device)
        loading += time.time() - mark
        with torch.autocast(device.type, torch.bfloat16, args.bf16):
            z = model.idm(*warp([now, future], args.warp) if args.warp else (now, future))
            z = z + 0.1 * torch.randn_like(z) if args.bottleneck == "noise" else z
            drawn = model.fdm(now, z)
            loss = sum(ratio(drawn[i], future[i], now[i]) for i in parts) / len(parts)      # of every k alike
        descend(loss, optimizer, step, args)
        seen.append(pooled(loss).item())
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            speed, share = (step + 1) * len(now) * WORLD / (time.time() - begin), 100 * loading / (time.time() - begin)
            tqdm.write(f"step {step + 1:6d}  error/copy {np.mean(seen[-args.log_every:]):.4f}  {speed:.0f} frames/s  loading {share:.0f} %")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(path, "lam", args, step + 1, model, optimizer, begin)
    latents = [encode(model, s, args.gap, args, device) for s in sets]
    [write(Path(args.out, f"latents.{s.name}.npy"), z) for s, z in zip(sets, latents)]
    [write(Path(args.out, f"latents{k}.{s.name}.npy"), encode(model, s, k, args, device)) for k in args.shorter or [] for s in sets]
    figures = evaluate(model, sets, latents, args, device) | dict(seconds=time.time() - begin)
    write(Path(args.out, "lam.json"), figures)
    draw(Path(args.out, "lam.png"), model, sets, latents, args, device)
    print("  ".join(f"{k} {np.round(v, 3)}" for k, v in figures.items() if v is not None and not isinstance(v, dict)))

if __name__ == "__main__":
    main()
