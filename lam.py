"""
Stage 1, the latent action model: from two frames of action-free video to the action between them.

An inverse dynamics model (IDM) sees the frames t and t+k and gives a small vector, the latent
action z_t = f(I_t, I_{t+k}). A forward dynamics model (FDM) sees frame t and z_t and must draw
frame t+k: I_{t+k} ~ g(I_t, z_t). They learn together from that drawing alone, so z has to say what
moved (HiLAM, arXiv 2603.05815, section 3.1; UniSkill, CoRL 2025): a wrong z must draw worse.

    python lam.py                                      # toy world, two minutes on a laptop
    python lam.py --data data/libero_10 --out out/libero_10 --gap 8 --latent 128 --wrist \\
                  --reverse --odd --warp 0.4 --lr 2e-3 --steps 1500

Expect on the toy world: FDM error 0.16 of copying frame t with the true z, above 1 with a wrong
one. Writes to OUT: lam.pt, lam.json, lam.png (what the FDM draws), lam_log.csv and its curve, and
latents.SET.npy (T, latent) for each packed set.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import f1_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from tqdm import tqdm

import data
from data import COUNT, REAL, WIDTH, fail, number, write


def get_args():
    parser = data.make_parser(__doc__, steps=1000)
    add = parser.add_argument_group("latent action").add_argument
    add("--gap", type=COUNT, default=1, help="k: frames from I_t to I_{t+k}; UniSkill: 20-40")
    add("--latent", type=number(int, 4), default=8, help="numbers of a latent; UniSkill: 64")
    add("--odd", action="store_true", help="half of z changes sign when time runs backwards")
    add("--wrist", action="store_true", help="see and draw the wrist camera too")
    add = parser.add_argument_group("model and training").add_argument
    add("--width", type=WIDTH, default=32, help="channels at first, doubled twice")
    add("--reverse", action="store_true", help="show every other pair backwards")
    add("--warp", type=REAL, default=0.0, help="random affine maps for the IDM; LIBERO: 0.4")
    add("--batch", type=COUNT, default=64, help="frame pairs a step and process, of all sets")
    add("--lr", type=number(float, 1e-9), default=4e-3, help="peak learning rate of AdamW")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe: for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs")
    return parser.parse_args()


# ----------------------------------------------------------------------------------------- models
def to_images(views, device):
    """Frames (B, S, S, 3) uint8 of each camera as networks see them: (B, cameras, 3, S, S)."""
    pixels = torch.from_numpy(np.stack(views, 1)).to(device)
    return pixels.permute(0, 1, 4, 2, 3).float() / 255


def read_images(dataset, rows, cameras, device):
    """The images of 1 or 2 cameras at these rows of a packed set, as networks see them."""
    return to_images([view[rows] for view in (dataset.frames, dataset.wrist)[:cameras]], device)


class ConvBlock(nn.Module):
    """3x3 convolution, GroupNorm, FiLM by a condition (B, C) if it is built with one, SiLU:
    (B, inside, H, W) -> (B, outside, H / stride, W / stride)."""

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
    Frames become a 16 x 16 grid of patches, averaged at the end: one motion, one z, anywhere."""

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
        free = z[:, self.odd :]
        free = F.layer_norm(free, free.shape[1:])  # no VQ; two of its numbers are bound
        if not self.odd:
            return free
        odd = (z - self.see(future, now))[:, : self.odd]  # z(a, b) = -z(b, a)
        odd = F.layer_norm(odd, odd.shape[1:], eps=1.0)  # eps 1: small where nothing moves
        return torch.cat([odd, free], dim=1)


class FDM(nn.Module):
    """Forward dynamics model, I_{t+k} ~ g(I_t, z_t): (B, C, S, S), (B, latent) -> (B, C, S, S).
    A U-Net with FiLM by z at every scale on the way up, so that z cannot be ignored."""

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
    """The IDM and the FDM of these settings (a dict of the flags), for frames of size x size."""

    def __init__(self, settings, size):
        super().__init__()
        if size % 16:
            fail(f"frames of {size} pixels make no 16 x 16 grid: pack them at a multiple of 16")
        self.cameras = 2 if settings["wrist"] else 1
        self.gap = settings["gap"]
        channels, latent, width = 3 * self.cameras, settings["latent"], settings["width"]
        self.idm = IDM(channels, size, latent, width, settings["odd"])
        self.fdm = FDM(channels, size, latent, width)

    def forward(self, now, future, warp_by=0.0):
        """Frame t+k, drawn from frame t and the latent action; the IDM sees warped frames."""
        seen = warp([now, future], warp_by) if warp_by else (now, future)
        return self.fdm(now, self.idm(*seen))

    def frames(self, dataset, rows, device):
        """Rows of a packed set as both models see them, all cameras' colours: (B, C, S, S)."""
        return read_images(dataset, rows, self.cameras, device).flatten(1, 2)


def load_lam(out, dataset, device):
    """The trained LAM of a run folder, for the frames of this packed set."""
    path = Path(out, "lam.pt")
    record = data.load_checkpoint(path, "lam")
    model = LAM(record["settings"], dataset.frames.shape[1])
    data.load_weights(model, record, path)
    return model.to(device)


def warp(frames, amount):
    """Frames, a list of (B, C, S, S), all under one random affine map a sample and camera: the code
    of a motion must not depend on where the camera stands."""
    now = frames[0]
    shape = (now.shape[0] * now.shape[1] // 3, 3, *now.shape[2:])  # cameras apart
    linear = torch.eye(2) + amount * torch.randn(shape[0], 2, 2).clamp(-2, 2) / 2
    shift = amount * (torch.rand(shape[0], 2, 1) - 0.5)
    affine = torch.cat([linear, shift], dim=2).to(now.device)
    grid = F.affine_grid(affine, shape, align_corners=False)
    cameras = [x.reshape(shape) for x in frames]
    warped = [F.grid_sample(x, grid, padding_mode="border", align_corners=False) for x in cameras]
    return [x.view_as(now) for x in warped]


# ------------------------------------------------------------------------------------------- data
def get_batch(model, sets, rows, count, reverse, rng, device):
    """About count frame pairs, as many of each set: I_t and I_{t+k}, (count, C, S, S) each."""
    nows, futures = [], []
    for dataset, choice in zip(sets, rows, strict=True):
        t = rng.choice(choice, max(1, count // len(sets)))
        turned = reverse * (np.arange(len(t)) % 2)  # 1 for every other pair, which runs backwards
        nows.append(model.frames(dataset, t + turned * model.gap, device))
        futures.append(model.frames(dataset, t + (1 - turned) * model.gap, device))
    return torch.cat(nows), torch.cat(futures)


@torch.no_grad()
def encode(model, dataset, device):
    """The latent actions of a packed set, (T, latent) float32, zeros where there's no frame t+k."""
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
    """R2 of each column of y_test, read from x_test by a ridge regression that x and y fitted."""
    fitted = make_pipeline(StandardScaler(), Ridge()).fit(x, y)
    r2 = r2_score(y_test, fitted.predict(x_test), multioutput="raw_values")
    return np.round(r2, 4).tolist()  # of a single row there is none: nan


def summed(array, rows, gap):
    """The sum of rows t, t+1, ..., t+k-1 of an array: what happens between frames t and t+k."""
    return sum(np.asarray(array[rows + i], np.float64) for i in range(gap))


def gripper_events(dataset, rows, gap):
    """-1 where the gripper closes between t and t+k, 1 where it opens, else 0; None if unknown."""
    opening = dataset.open("truth_opening")
    if opening is None:
        return None
    change = (opening[rows + gap] - opening[rows]) / max(np.ptp(opening), 1e-6)
    return np.sign(change) * (np.abs(change) > 0.05)  # of the whole way


def probe(sets, latents, gap):
    """Linear probes on held-out episodes of the last set whose truth is known: R2 of the actions,
    F1 of "closes" and "opens". Only here does this stage use actions."""
    figures = {}
    for dataset, z in zip(sets, latents, strict=True):
        train = dataset.rows(dataset.split("train"), gap)
        val = dataset.rows(dataset.split("val"), gap)
        if dataset.actions is not None:
            truth, unseen = (summed(dataset.actions, rows, gap) for rows in (train, val))
            figures["action_r2"] = ridge(z[train], truth, z[val], unseen)
        grip = gripper_events(dataset, train, gap)
        if grip is not None and len(np.unique(grip)) == 3:
            guess = LogisticRegression(max_iter=500).fit(z[train], grip).predict(z[val])
            true = gripper_events(dataset, val, gap)
            f1 = f1_score(true, guess, labels=[-1, 1], average="macro")
            figures["gripper_f1"] = round(float(f1), 4)
    return figures


@torch.no_grad()
def evaluate(model, sets, latents, device):
    """On held-out episodes: the FDM's squared error over that of copying frame t, with the true
    latent and with one of another moment; and the probes."""
    rng = np.random.default_rng(0)
    errors = np.zeros(3)  # with the true latent, with another, of copying
    for dataset, z in zip(sets, latents, strict=True):
        rows = rng.permutation(dataset.rows(dataset.split("val"), model.gap))[:1024]
        other = rng.permutation(rows)
        for part in np.array_split(np.arange(len(rows)), 1 + len(rows) // 256):
            now = model.frames(dataset, rows[part], device)
            future = model.frames(dataset, rows[part] + model.gap, device)
            true, shuffled = torch.from_numpy(z[rows[part]]), torch.from_numpy(z[other[part]])
            drawn = [model.fdm(now, code.to(device)) for code in (true, shuffled)]
            for i, frames in enumerate([*drawn, now]):
                errors[i] += float((frames - future).square().mean()) * len(part)
    error, other_error = (errors[:2] / max(errors[2], 1e-12)).round(4).tolist()
    figures = {"fdm_error": error, "fdm_error_shuffled": other_error}
    return figures | probe(sets, latents, model.gap)


def draw_strip(path, rows, caption, marks=None):
    """Draw film strips, one under the other. rows: (label, frames (N, S, S, 3) uint8);
    marks: {(row, column): the colour of that frame's edge}."""
    longest = max(len(frames) for _, frames in rows)
    figure = Figure((0.8 * longest, 1.15 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), longest, squeeze=False)
    for r, (label, frames) in enumerate(rows):
        axes[r, 0].text(0, 1.15, label, transform=axes[r, 0].transAxes, in_layout=False)
        for c, axis in enumerate(axes[r]):
            axis.set(xticks=[], yticks=[], visible=c < len(frames))
            if c < len(frames):
                axis.imshow(frames[c])
            axis.spines[:].set(color=(marks or {}).get((r, c), "white"), linewidth=4)
    figure.suptitle(caption)
    write(path, figure)


def to_pixels(images):
    """Images (B, C, S, S) in [0, 1] -> the first camera's pixels (B, S, S, 3) uint8."""
    return images[:, :3].clamp(0, 1).mul(255).byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def draw(path, model, sets, latents, device):
    """How the FDM changes frame t with the true latent and with another moment's, for each set; and
    with the first set's first latent in all frames of the last set (hand to robot)."""
    rng = np.random.default_rng(1)
    strip, codes = [], []
    for dataset, z in zip(sets, latents, strict=True):
        rows = np.sort(rng.choice(dataset.rows(dataset.split("val"), model.gap), 8))
        now = model.frames(dataset, rows, device)
        future = model.frames(dataset, rows + model.gap, device)
        true = torch.from_numpy(z[rows]).to(device)
        codes.append(true)
        strip.append((f"{dataset.name}: frame t", to_pixels(now)))
        strip.append((f"what changes until frame t+{model.gap}", to_pixels(0.5 + future - now)))
        tried = {"the true z": true, "the z of the frame on its left": true.roll(1, 0)}
        if dataset is sets[-1] and len(sets) > 1:
            tried[f"the first z of {sets[0].name}, in all frames"] = codes[0][:1].expand_as(true)
        for name, code in tried.items():
            change = model.fdm(now, code) - now
            strip.append((f"what the FDM changes with {name}", to_pixels(0.5 + change)))
    draw_strip(path, strip, "grey: no change; with the true z the FDM draws the video's change")


def report(out, model, sets, device):
    """Write the latents, measure what they are worth, print it, draw it."""
    latents = [encode(model, dataset, device) for dataset in sets]
    for dataset, z in zip(sets, latents, strict=True):
        path = Path(out, f"latents.{dataset.name}.npy")
        if not path.exists():  # later stages know its checksum; another device has other last bits
            write(path, z)
    figures = evaluate(model, sets, latents, device)
    write(Path(out, "lam.json"), figures)
    draw(Path(out, "lam.png"), model, sets, latents, device)
    print("on held-out episodes, error of the FDM's frame t+k over that of copying frame t:")
    print(f"  with the true z {figures['fdm_error']:.2f}")
    print(f"  with the z of another moment {figures['fdm_error_shuffled']:.2f}")
    if "action_r2" in figures:
        print(f"  R2 from z to each number of the action: {np.round(figures['action_r2'], 2)}")
    if "gripper_f1" in figures:
        print(f"  F1 of the gripper's closing and opening: {figures['gripper_f1']:.2f}")


def main():
    args = get_args()
    device, rank, world = data.start(args.device)
    torch.manual_seed(args.seed)
    sets = data.open_sets(args.data)
    if args.wrist and any(dataset.wrist is None for dataset in sets):
        fail("--wrist: not all of the sets have a wrist camera")
    rows = [dataset.rows(dataset.split("train"), args.gap) for dataset in sets]
    held_out = [dataset.rows(dataset.split("val"), args.gap) for dataset in sets]
    for d, *both in zip(sets, rows, held_out, strict=True):
        if min(map(len, both)) == 0:
            fail(f"{d.name}: --gap {args.gap} is longer than all episodes to learn or held out")
    model = LAM(vars(args), sets[0].frames.shape[1]).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    settings = vars(args) | {"world": world, "data": [d.checksum() for d in sets]}
    path = Path(args.out, "lam.pt")
    first, log = data.resume(path, "lam", settings, model, optimizer, "latents.*.npy")
    if args.compile:
        model.compile()
    wrapped = nn.parallel.DistributedDataParallel(model) if world > 1 else model

    now, future = get_batch(model, sets, rows, 512, False, np.random.default_rng(0), device)
    copy_error = max(F.mse_loss(now, future).item(), 1e-8)  # unit of the loss: copying frame t
    seen, begin = [], time.time()
    for step in tqdm(range(first, args.steps), "lam", disable=rank > 0 or None):
        rng = np.random.default_rng([args.seed, step])  # the batch, the same in a resumed run
        torch.manual_seed(args.seed * 1_000_003 + step + 999_983 * rank)  # and its warps
        cosine = 0.525 + 0.475 * math.cos(math.pi * step / args.steps)  # from 1 to a twentieth
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine * min(1, (step + 1) / 100)  # after a warm-up
        now, future = get_batch(model, sets, rows, args.batch * world, args.reverse, rng, device)
        now, future = now[rank::world], future[rank::world]
        with torch.autocast(device.type, torch.bfloat16, args.bf16):
            loss = F.mse_loss(wrapped(now, future, args.warp), future) / copy_error
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        data.stop_unless_finite(norm, step, path)
        optimizer.step()
        seen.append({"step": step + 1, "frame error over copying": loss.item()})
        if rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == args.steps):
            data.add_to_log(Path(args.out, "lam"), log, seen, first, begin)
            seen = []
            record = {"stage": "lam", "settings": settings, "step": step + 1, "steps": args.steps}
            record |= {"log": log, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            write(path, record)
    if rank == 0:
        report(args.out, model, sets, device)


if __name__ == "__main__":
    main()
