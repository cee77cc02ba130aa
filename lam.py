"""
Stage 1, the latent action model: from two frames of action-free video to the action between them.

An inverse dynamics model (IDM) sees the frames t and t+k and gives a small vector, the latent
action z_t = f(I_t, I_{t+k}). A forward dynamics model (FDM) sees frame t and z_t and must draw
frame t+k: I_{t+k} ~ g(I_t, z_t). They are trained together on nothing but that drawing, so z has
to say what moved (HiLAM, arXiv 2603.05815, section 3.1; UniSkill, CoRL 2025). The danger is a z
that is ignored: the report holds the drawing with the true z against those with a wrong one.

    python lam.py                                      # toy world, a minute and a half on a laptop
    python lam.py --data data/libero_10 --out out/libero_10 --gap 8 --latent 128 --wrist \\
                  --reverse --odd --warp 0.4 --lr 2e-3 --steps 4000

Expect on the toy world: FDM error 0.15 of copying frame t with the true z, above 1 with a wrong
one. Writes to OUT: lam.pt, lam.json, lam.png (what the FDM draws), lam_log.csv and its curve, and
latents.SET.npy (T, latent) for each packed set.
"""

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy.stats import entropy
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import data
from data import COUNT, REAL, fail, number, write


def get_args():
    parser = data.make_parser(__doc__, steps=1000)
    add = parser.add_argument_group("latent action").add_argument
    add("--gap", type=COUNT, default=1, help="k: frames from I_t to I_{t+k}; UniSkill: 20-40")
    add("--latent", type=number(int, 3), default=8, help="numbers of a latent; UniSkill: 64")
    add("--odd", action="store_true", help="half of z changes sign when time runs backwards")
    add("--wrist", action="store_true", help="see and draw the wrist camera too")
    add = parser.add_argument_group("model and training").add_argument
    add("--width", type=number(int, 8), default=32, help="channels at first, doubled twice")
    add("--reverse", action="store_true", help="show every other pair backwards, against habit")
    add(
        "--warp", type=REAL, default=0.0, help="random affine maps of what the IDM sees; LIBERO 0.4"
    )
    add(
        "--batch",
        type=COUNT,
        default=64,
        help="frame pairs a step and process, equally of each set",
    )
    add("--lr", type=number(float, 1e-9), default=4e-3, help="peak learning rate of AdamW")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe: for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------- models
class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, FiLM by a condition vector if it is built with one, SiLU.

    (B, inside, H, W), condition (B, C) or None -> (B, outside, H / stride, W / stride).
    """

    def __init__(self, inside, outside, stride=1, condition=0):
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride, 1)
        self.norm = nn.GroupNorm(8, outside)
        self.film = nn.Linear(condition, 2 * outside) if condition else None

    def forward(self, x, condition=None):
        x = self.norm(self.conv(x))
        if self.film is not None:
            scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
            x = x * (1 + scale) + shift
        return F.silu(x)


class IDM(nn.Module):
    """Inverse dynamics model, z_t = f(I_t, I_{t+k}): (B, C, S, S) twice -> (B, latent).

    Frames become a 16 x 16 grid of patches, averaged at the end: one motion, one z, anywhere.
    """

    def __init__(self, channels, size, latent, width, odd):
        super().__init__()
        self.patch = size // 16
        self.odd = latent // 2 if odd else 0
        self.body = nn.Sequential(
            ConvBlock(2 * channels * self.patch**2, width),
            ConvBlock(width, 2 * width, 2),
            ConvBlock(2 * width, 4 * width, 2),
            ConvBlock(4 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, latent),
        )

    def see(self, now, future):
        """The code of a pair before it is normalised. It sees the frame and what changes in it."""
        pair = torch.cat([now - 0.5, 4 * (future - now)], dim=1)
        return self.body(F.pixel_unshuffle(pair, self.patch))

    def forward(self, now, future):
        z = self.see(now, future)
        free = F.layer_norm(z[:, self.odd :], z[0, self.odd :].shape)  # as in UniSkill, no VQ
        if not self.odd:
            return free
        odd = (z - self.see(future, now))[:, : self.odd]  # z(a, b) = -z(b, a)
        odd = F.layer_norm(odd, odd[0].shape, eps=1.0)  # eps 1: small where nothing moves
        return torch.cat([odd, free], dim=1)


class FDM(nn.Module):
    """Forward dynamics model, I_{t+k} = I_t + g(I_t, z_t): (B, C, S, S), (B, latent) -> I_{t+k}.

    A U-Net with FiLM by z at every scale on the way up; at the bottleneck alone z is ignored.
    """

    def __init__(self, channels, size, latent, width):
        super().__init__()
        self.patch = size // 16
        colours = channels * self.patch**2
        self.embed = nn.Linear(latent, 4 * width)
        self.down1 = ConvBlock(colours, width)
        self.down2 = ConvBlock(width, 2 * width, 2)
        self.down3 = ConvBlock(2 * width, 4 * width, 2)
        self.middle = ConvBlock(4 * width, 4 * width, 1, 4 * width)
        self.up2 = ConvBlock(6 * width, 2 * width, 1, 4 * width)
        self.up1 = ConvBlock(3 * width, width, 1, 4 * width)
        self.last = ConvBlock(width, width, 1, 4 * width)
        self.out = nn.Conv2d(width, colours, 3, 1, 1)
        nn.init.zeros_(self.out.weight)  # at the start the drawing is the current frame
        nn.init.zeros_(self.out.bias)

    def forward(self, now, z):
        z = self.embed(z)
        fine = self.down1(F.pixel_unshuffle(now - 0.5, self.patch))  # (B, width, 16, 16)
        medium = self.down2(fine)  # (B, 2 width, 8, 8)
        x = self.middle(self.down3(medium), z)  # (B, 4 width, 4, 4)
        x = self.up2(torch.cat([F.interpolate(x, scale_factor=2), medium], dim=1), z)
        x = self.up1(torch.cat([F.interpolate(x, scale_factor=2), fine], dim=1), z)
        change = F.pixel_shuffle(self.out(self.last(x, z)), self.patch)
        return now + 0.1 * change  # 0.1: changes are small, so the network's steps are too


class LAM(nn.Module):
    """The IDM and the FDM of these settings (a dict of the flags), for square frames of a size."""

    def __init__(self, settings, size):
        super().__init__()
        if size % 16:
            fail(f"frames of {size} pixels make no 16 x 16 grid: pack them at a multiple of 16")
        if settings["width"] % 8:
            fail(f"--width {settings['width']}: choose a multiple of 8")
        self.cameras = 2 if settings["wrist"] else 1
        self.gap = settings["gap"]
        shape = (3 * self.cameras, size, settings["latent"], settings["width"])
        self.idm = IDM(*shape, settings["odd"])
        self.fdm = FDM(*shape)

    def forward(self, now, future, warp_by=0.0):
        """Frame t+k, drawn from frame t and the latent action; the IDM sees warped frames."""
        if warp_by:
            return self.fdm(now, self.idm(*warp(now, future, warp_by)))
        return self.fdm(now, self.idm(now, future))

    def frames(self, dataset, rows, device):
        """Rows of a packed set as both models see them, the cameras' colours stacked: (B, C, S, S)."""
        return dataset.images(rows, self.cameras, device).flatten(1, 2)


def load_lam(out, dataset, device):
    """The trained LAM of a run folder, for the frames of this packed set."""
    path = Path(out, "lam.pt")
    record = data.load_checkpoint(path, "lam")
    model = LAM(record["settings"], dataset.frames.shape[1])
    data.load_weights(model, record, path)
    return model.to(device)


def warp(now, future, amount):
    """Both frames (B, C, S, S) under one random affine map a sample and camera: the code of a
    motion must not depend on where the camera stands."""
    shape = (now.shape[0] * now.shape[1] // 3, 3, *now.shape[2:])  # cameras apart
    turn = torch.eye(2) + amount * torch.randn(shape[0], 2, 2).clamp(-2, 2) / 2
    shift = amount * (torch.rand(shape[0], 2, 1) - 0.5)
    grid = F.affine_grid(torch.cat([turn, shift], dim=2).to(now.device), shape, False)
    warped = [
        F.grid_sample(frames.reshape(shape), grid, "bilinear", "border", False).view_as(frames)
        for frames in (now, future)
    ]
    return warped


# ------------------------------------------------------------------------------------------- data
def get_batch(model, sets, rows, count, reverse, rng, device):
    """count frame pairs, as many of each set: I_t and I_{t+k}, (count, C, S, S) each."""
    nows, futures = [], []
    for dataset, choice in zip(sets, rows, strict=True):
        t = rng.choice(choice, max(1, count // len(sets)))
        backwards = reverse * (np.arange(len(t)) % 2) * model.gap
        nows.append(model.frames(dataset, t + backwards, device))
        futures.append(model.frames(dataset, t + model.gap - backwards, device))
    return torch.cat(nows), torch.cat(futures)


@torch.no_grad()
def encode(model, dataset, device):
    """The latent actions of a packed set, (T, latent) float32; zeros where there is no frame t+k."""
    latents = np.zeros((dataset.total, model.fdm.embed.in_features), np.float32)
    rows = dataset.rows(range(len(dataset.start)), model.gap)
    parts = np.array_split(rows, 1 + len(rows) // 256)
    for part in tqdm(parts, f"latents of {dataset.name}", disable=None):
        now = model.frames(dataset, part, device)
        future = model.frames(dataset, part + model.gap, device)
        latents[part] = model.idm(now, future).float().cpu().numpy()
    return latents


# ------------------------------------------------------------------------- what a latent is worth
def ridge(x, y, x_test, y_test):
    """R2 of each column of y_test, predicted linearly from x_test by a ridge regression of y on x."""
    fitted = make_pipeline(StandardScaler(), Ridge()).fit(x, y)
    return r2_score(y_test, fitted.predict(x_test), multioutput="raw_values").round(4).tolist()


def summed(array, rows, gap):
    """The sum of rows t, t+1, ..., t+k-1 of an array: what happens between frames t and t+k."""
    return sum(np.asarray(array[rows + i], np.float64) for i in range(gap))


def gripper_events(dataset, rows, gap):
    """-1 where the gripper closes between t and t+k, 1 where it opens, else 0; None if unknown."""
    motion = dataset.open("truth_motion")
    if motion is not None:
        change = summed(motion, rows, gap)[:, 2]
    elif (
        dataset.proprio is not None and dataset.proprio.shape[1] == 9
    ):  # LIBERO's last two: fingers
        opening = dataset.proprio[:, -2] - dataset.proprio[:, -1]
        change = (opening[rows + gap] - opening[rows]) / max(np.ptp(opening), 1e-6)
    else:
        return None
    return np.sign(change) * (np.abs(change) > 0.05)  # of the whole way


def probe(sets, latents, gap):
    """What probes, fitted on training episodes, read from held-out latents: the R2 of the true
    actions, the F1 of "closes" and "opens", and the R2 of the last set's true motion dx, dy by a
    probe fitted on the first (hand to robot). The only place where this stage opens actions."""
    figures = {}
    for dataset, z in zip(sets, latents, strict=True):
        train = dataset.rows(dataset.split("train"), gap)
        val = dataset.rows(dataset.split("val"), gap)
        actions = dataset.true_actions()
        if actions is not None:
            truth = (summed(actions, train, gap), summed(actions, val, gap))
            figures["action_r2"] = ridge(z[train], truth[0], z[val], truth[1])
        grip = gripper_events(dataset, train, gap)
        if grip is not None and len(np.unique(grip)) == 3:
            guess = LogisticRegression(max_iter=500).fit(z[train], grip).predict(z[val])
            true = gripper_events(dataset, val, gap)
            score = f1_score(true, guess, labels=[-1, 1], average="macro")
            figures["gripper_f1"] = round(float(score), 4)
    motions = [dataset.open("truth_motion") for dataset in sets]
    if len(sets) > 1 and motions[0] is not None and motions[-1] is not None:
        train = sets[0].rows(sets[0].split("train"), gap)
        val = sets[-1].rows(sets[-1].split("val"), gap)
        truth = [summed(m, r, gap)[:, :2] for m, r in ((motions[0], train), (motions[-1], val))]
        figures["transfer_r2"] = ridge(latents[0][train], truth[0], latents[-1][val], truth[1])
    return figures


@torch.no_grad()
def evaluate(model, sets, latents, device):
    """On held-out episodes: the FDM's squared error over that of copying frame t, with the true
    latent, with one of another moment, with zero; the latents' effective rank; and the probes."""
    rng = np.random.default_rng(0)
    errors, copies, seen = np.zeros(3), 0.0, []
    for dataset, z in zip(sets, latents, strict=True):
        rows = dataset.rows(dataset.split("val"), model.gap)
        seen.append(z[rows])
        rows = rng.permutation(rows)[:1024]
        other = rng.permutation(rows)
        for part in np.array_split(np.arange(len(rows)), 1 + len(rows) // 256):
            now = model.frames(dataset, rows[part], device)
            future = model.frames(dataset, rows[part] + model.gap, device)
            copies += float((now - future).square().mean()) * len(part)
            true = z[rows[part]]
            for i, tried in enumerate([true, z[other[part]], np.zeros_like(true)]):
                drawn = model.fdm(now, torch.from_numpy(tried).to(device))
                errors[i] += float((drawn - future).square().mean()) * len(part)
    names = ["fdm_error", "fdm_error_shuffled", "fdm_error_zero"]
    figures = dict(zip(names, (errors / copies).round(4).tolist(), strict=True))
    spectrum = np.linalg.eigvalsh(np.cov(np.concatenate(seen).T)).clip(1e-12)
    figures["effective_rank"] = round(float(np.exp(entropy(spectrum))), 2)  # Roy and Vetterli 2007
    return figures | probe(sets, latents, model.gap)


def draw_strip(path, rows, caption, marks=None):
    """Draw film strips, one under the other. rows: (label, frames (N, S, S, 3) uint8); caption: what
    to look for; marks: {(row, column): the colour of that frame's edge}."""
    longest = max(len(frames) for _, frames in rows)
    figure = Figure((0.8 * longest, 1.15 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), longest, squeeze=False)
    for r, (label, frames) in enumerate(rows):
        axes[r, 0].set_title(label, loc="left")
        for c, axis in enumerate(axes[r]):
            axis.set(xticks=[], yticks=[])
            axis.set_visible(c < len(frames))
            if c < len(frames):
                axis.imshow(frames[c])
            for edge in axis.spines.values():
                edge.set(color=(marks or {}).get((r, c), "white"), linewidth=4)
    figure.suptitle(caption)
    write(path, figure)


def to_pixels(dataset, images):
    """Images (B, C, S, S) in [0, 1] as people look at them: (B, S, S, 3) uint8, the first camera."""
    pixels = images[:, :3].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1)
    return dataset.upright(pixels.cpu().numpy())


@torch.no_grad()
def draw(path, model, sets, latents, device):
    """What the FDM draws from the true latent, another moment's and zero, for each set; and what
    the first set's first latent does to all frames of the last set (hand to robot)."""
    rng = np.random.default_rng(1)
    strip, first = [], None
    for dataset, z in zip(sets, latents, strict=True):
        rows = np.sort(rng.choice(dataset.rows(dataset.split("val"), model.gap), 8))
        now = model.frames(dataset, rows, device)
        true = torch.from_numpy(z[rows]).to(device)
        first = true[:1] if first is None else first
        strip.append((f"{dataset.name}: frame t", to_pixels(dataset, now)))
        future = model.frames(dataset, rows + model.gap, device)
        strip.append((f"frame t+{model.gap}", to_pixels(dataset, future)))
        tried = {"the true z": true, "the z of the frame on its left": true.roll(1, 0)}
        for name, code in (tried | {"z = 0": 0 * true}).items():
            strip.append((f"FDM with {name}", to_pixels(dataset, model.fdm(now, code))))
    if len(sets) > 1:
        moved = model.fdm(now, first.expand(len(now), -1))
        strip.append((f"FDM with the first z of {sets[0].name}", to_pixels(dataset, moved)))
    caption = f"with the true z the drawing is frame t+{model.gap}; with others it moves otherwise"
    draw_strip(path, strip, caption)


def report(out, model, sets, device):
    """Write the latents, measure what they are worth, print it, draw it."""
    latents = [encode(model, dataset, device) for dataset in sets]
    for dataset, z in zip(sets, latents, strict=True):
        write(Path(out, f"latents.{dataset.name}.npy"), z)
    figures = evaluate(model, sets, latents, device)
    write(Path(out, "lam.json"), figures)
    draw(Path(out, "lam.png"), model, sets, latents, device)
    true, shuffled, zero = (figures[f"fdm_error{name}"] for name in ("", "_shuffled", "_zero"))
    print("on held-out episodes:")
    print(f"  frame t+k drawn by the FDM, error over that of copying frame t: {true:.2f}")
    print(f"    with the z of another moment {shuffled:.2f}, with zero {zero:.2f}")
    print(f"  effective rank of z: {figures['effective_rank']:.1f}")
    if "action_r2" in figures:
        print(f"  R2 from z to each number of the action: {figures['action_r2']}")
    if "gripper_f1" in figures:
        print(f"  F1 of the gripper's closing and opening: {figures['gripper_f1']:.2f}")
    if "transfer_r2" in figures:
        print(
            f"  R2 of {sets[-1].name}'s dx, dy, read as in {sets[0].name}: {figures['transfer_r2']}"
        )


def main():
    args = get_args()
    device, rank, world = data.start(args.out, args.device)
    random.seed(args.seed)
    np.random.seed(args.seed)
    torch.manual_seed(args.seed)
    sets = data.open_sets(args.data)
    rows = [dataset.rows(dataset.split("train"), args.gap) for dataset in sets]
    if min(map(len, rows)) == 0:
        fail(f"--gap {args.gap} is longer than every episode of a set")
    model = LAM(vars(args), sets[0].frames.shape[1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    settings = vars(args) | {"world": world, "data": data.checksum(*[d.frames for d in sets])}
    path = Path(args.out, "lam.pt")
    first, log = data.resume(path, "lam", settings, model, optimizer)
    if args.compile:
        model.compile()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    batch = args.batch * world
    now, future = get_batch(model, sets, rows, 512, False, np.random.default_rng(0), device)
    copy_error = F.mse_loss(now, future).item()  # the unit of the loss: 1 is copying frame t
    seen, begin = [], time.time()
    for step in tqdm(range(first, args.steps), "lam", disable=rank > 0 or None):
        rng = np.random.default_rng([args.seed, step])  # chance hangs on seed and step alone, so
        torch.manual_seed(args.seed * 1_000_003 + step)  # a resumed run repeats itself exactly
        share = 0.525 + 0.475 * math.cos(math.pi * step / args.steps)  # a cosine to a twentieth
        for group in optimizer.param_groups:
            group["lr"] = args.lr * share * min(1, (step + 1) / 100)  # after a warm-up
        now, future = get_batch(model, sets, rows, batch, args.reverse, rng, device)
        now, future = now[rank::world], future[rank::world]
        with torch.autocast(device.type, torch.bfloat16, args.bf16):
            loss = F.mse_loss(wrapped(now, future, args.warp), future) / copy_error
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen.append({"step": step + 1, "frame error over copying": loss.item()})
        if rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == args.steps):
            log.append(data.log_row(seen, "lam", first, begin))
            seen = []
            data.write_log(Path(args.out, "lam"), log)
            record = {"stage": "lam", "settings": settings, "step": step + 1, "steps": args.steps}
            record |= {"log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, record)
    if rank == 0:
        report(args.out, model, sets, device)


if __name__ == "__main__":
    main()
