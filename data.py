"""
What the four stages share: the packed dataset, the toy world, the importers, a few file helpers.

A packed dataset is a folder of flat arrays over all T frames of all episodes, like nanoGPT's
train.bin, and an episodes.json that says where each episode starts:
    frames.bin   (T, S, S, 3) uint8       wrist.bin    (T, S, S, 3) uint8, a second camera
    actions.bin  (T, A) float32           proprio.bin  (T, P) float32, what the body feels
    truth_*.bin  what a scripted demonstrator knows (phase, motion, actions): to measure with only
All but frames may be missing: without actions it is action-free video. Each stage adds one more
array of length T, so frame t, its latent, its skill and its action t are the same row.

    python data.py toy    --out data/toy                               # built in, 20 seconds
    python data.py libero --src DATASETS/libero_10 --out data/libero_10
    python data.py video  --src VIDEOS --labels captions.json --out data/videos
"""

import argparse
import csv
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import time
import zlib
from itertools import islice, permutations
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

TOY_SETS = ["data/toy/hand", "data/toy/robot"]
VIDEOS, IMAGES = [".webm", ".mp4", ".gif"], [".jpg", ".jpeg", ".png"]


# ------------------------------------------------------------------------- command line and start
def fail(message):
    """Say in one line what is wrong and leave with exit status 2. Tracebacks are for bugs."""
    print(f"error: {textwrap.shorten(message, 500)}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, least, most=math.inf):
    """An argparse type: numbers of a kind (int, float) from least to most, both included."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most):
            raise ValueError
        return value

    parse.__name__ = f"{kind.__name__}, from {least} to {most},"  # argparse says "invalid ..."
    return parse


COUNT, SEED = number(int, 1), number(int, 0, 2**32 - 1)
REAL, SHARE = number(float, 0), number(float, 0, 1)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """--help shows the script's docstring as it stands, and the default of each flag."""


def make_parser(doc, steps=None):
    """A script's parser; with steps, the default of --steps, it has the flags of all trainings."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=Help)
    parser.error = fail
    if steps:
        add = parser.add_argument_group("run").add_argument
        add("--data", nargs="+", default=TOY_SETS, help="packed datasets")
        add("--out", default="out/toy", help="run folder, one for all stages")
        add("--steps", type=COUNT, default=steps, help="training steps")
        add("--seed", type=SEED, default=0, help="same seed, same result")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--log-every", type=COUNT, default=100, help="steps between lines of log, checkpoints")
    return parser


def start(out, device="auto"):
    """Make the run folder and join the processes that torchrun started; returns the torch.device,
    the rank of this process (0 writes and prints) and how many there are."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    if name not in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        fail(f"--device {device}: no such device here; use --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("nccl" if "cuda" in name else "gloo")
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"--out: no folder can be made there ({error})")
    return torch.device(name), int(os.environ.get("RANK", 0)), world


# ----------------------------------------------------------------------------- files and pictures
def write(path, content):
    """Write .npy, .pt, .png (a matplotlib figure), text or JSON, renamed when the file is whole."""
    ending = Path(path).suffix
    with open(f"{path}.tmp", "wb") as file:
        if ending == ".npy":
            np.save(file, content)
        elif ending == ".pt":
            torch.save(content, file)
        elif ending == ".png":
            content.savefig(file, format="png")
        else:
            text = content if ending == ".csv" else json.dumps(content, indent=1)
            file.write(text.encode())
    os.replace(f"{path}.tmp", path)


def log_row(seen, name, first, begin):
    """The mean of the last steps' values (dicts with a key step), printed as the line of log."""
    row = {key: float(np.mean([values[key] for values in seen])) for key in seen[0]}
    row["step"] = seen[-1]["step"]
    text = "   ".join(f"{key} {value:.3f}" for key, value in row.items() if key != "step")
    speed = (row["step"] - first) / (time.time() - begin)
    tqdm.write(f"{name} step {row['step']:6d}   {text}   {speed:.1f} steps/s")
    return row


def write_log(stem, log):
    """STEM_log.csv and its curves, STEM_log.png. log: a list of {"step": ..., name: value, ...}."""
    lines = [",".join(log[0])] + [",".join(f"{x:.6g}" for x in row.values()) for row in log]
    write(f"{stem}_log.csv", "\n".join(lines) + "\n")
    names = [key for key in log[0] if key != "step"]
    figure = Figure((4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in log], [row[name] for row in log])
        axis.set(xlabel="training step", title=name)
        axis.grid(alpha=0.3)
    write(f"{stem}_log.png", figure)


def checksum(*arrays):
    """Checksum of a thousand rows of each array: tells whether a run goes on with the same data."""
    parts = [array[:: 1 + len(array) // 1000].tobytes() for array in arrays]
    return zlib.crc32(b"".join(parts))


def load_checkpoint(path, stage, finished=True):
    """A stage's checkpoint, a dict; exits when it is missing, damaged, another's or unfinished."""
    again = f"run `python {stage.split('_')[0]}.py` with the same --out first"
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        found, complete = record["stage"], record["step"] >= record["steps"]
    except Exception as error:
        fail(f"{path} is not a readable checkpoint ({type(error).__name__}): {again}")
    if found != stage:
        fail(f"{path} is a checkpoint of {found}, not of {stage}")
    if finished and not complete:
        fail(f"{path} stopped at step {record['step']} of {record['steps']}: {again}")
    return record


def load_weights(model, record, path):
    """Load a checkpoint's weights; exits when they are of another shape."""
    try:
        model.load_state_dict(record["model"])
    except RuntimeError as error:
        fail(f"{path} holds a model of another shape: {error}")


def resume(path, stage, settings, model, optimizer):
    """Load weights and optimizer from the checkpoint at path; returns its step and log, or 0 and []
    without one. Exits when settings, a dict of what decides the result, are not the same."""
    if not Path(path).exists():
        return 0, []
    record = load_checkpoint(path, stage, finished=False)
    for key in sorted(set(settings) - {"out", "device", "log_every"}):
        old = record["settings"].get(key)
        if old != settings[key]:
            fail(f"{path} was trained with {key} {old}, not {settings[key]}: choose another --out")
    load_weights(model, record, path)
    optimizer.load_state_dict(record["optimizer"])
    return record["step"], record["log"]


# ------------------------------------------------------------------------------ the packed dataset
class Packed:
    """A packed dataset, memory-mapped: frames, wrist, proprio, actions over all T rows, None where
    it has none, and the first row and the number of frames of each episode, start, length (E,)."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.name
        try:
            info = json.loads((self.path / "episodes.json").read_text())
            self.arrays, self.episodes = info["arrays"], info["episodes"]
            self.phases, self.upside_down = info["phases"], info["upside_down"]
            self.length = np.array([episode["length"] for episode in self.episodes])
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{path} is no packed dataset; data.py makes one, see `python data.py --help`")
        self.start = self.length.cumsum() - self.length
        self.total = int(self.length.sum())
        self.frames, self.wrist = self.open("frames"), self.open("wrist")
        self.proprio, self.actions = self.open("proprio"), self.open("actions")

    def open(self, key):
        """An array of the set by its name, or None; exits when its file has a wrong size."""
        if key not in self.arrays:
            return None
        dtype = np.dtype(self.arrays[key]["dtype"])
        shape = (self.total, *self.arrays[key]["shape"])
        file = self.path / f"{key}.bin"
        found = file.stat().st_size if file.exists() else 0
        if found != math.prod(shape) * dtype.itemsize:
            fail(f"{file} has {found} bytes, but {shape} {dtype} by episodes.json")
        return np.memmap(file, dtype, "r", shape=shape)

    def true_actions(self):
        """The actions to measure with, which may be known where none are given to train on."""
        truth = self.open("truth_actions")
        return self.actions if truth is None else truth

    def split(self, name):
        """Numbers of the episodes of a split, train or val; where no episode is held out, all."""
        chosen = [i for i, episode in enumerate(self.episodes) if episode["split"] == name]
        return np.array(chosen or range(len(self.episodes)))

    def rows(self, episodes, gap=0):
        """The rows t of these episodes for which t + gap lies in the same episode."""
        ends = self.start + np.maximum(0, self.length - gap)
        return np.concatenate([np.arange(self.start[e], ends[e]) for e in episodes])

    def images(self, rows, cameras, device):
        """Frames, and the wrist camera's where cameras is 2: (B, cameras, 3, S, S) in [0, 1]."""
        if cameras > 1 and self.wrist is None:
            fail(f"{self.path} has no wrist camera")
        views = [view[rows] for view in (self.frames, self.wrist)[:cameras]]
        return to_images(views, device)

    def upright(self, frames):
        """Frames (..., S, S, 3) as a person wants to see them: LIBERO stores them upside down."""
        return frames[..., ::-1, :, :] if self.upside_down else frames


def to_images(views, device):
    """Frames (B, S, S, 3) uint8 of one or more cameras as networks see them: (B, cameras, 3, S, S)
    in [0, 1]."""
    pixels = torch.from_numpy(np.stack(views, 1)).to(device, non_blocking=True)
    return pixels.permute(0, 1, 4, 2, 3).float() / 255


def open_sets(paths):
    """Packed datasets, checked to fit each other. The toy world is packed when it is missing."""
    if list(paths) == TOY_SETS:
        pack_toy("data/toy")
    sets = [Packed(path) for path in paths]
    if len({dataset.name for dataset in sets}) < len(sets):
        fail("two datasets of the same name: latents are filed by folder name, so rename one")
    if len({dataset.frames.shape[1] for dataset in sets}) > 1:
        fail(f"frames of different size: {[dataset.frames.shape for dataset in sets]}")
    return sets


def pack(out, episodes, total=None, upside_down=False, phases=()):
    """Write a packed dataset; exits when arrays do not fit each other, or hold NaN. episodes yields
    (text, task, split, {name: array over its frames}); phases are the names of truth_phase."""
    out = Path(out)
    if out.exists():
        fail(f"{out} exists already: delete it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    arrays, records = {}, []
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
        whole = Path(temporary, "set")
        whole.mkdir()
        for text, task, split, episode in tqdm(episodes, str(out), total, disable=None):
            length = len(episode["frames"])
            for key, value in episode.items():
                kind = {"dtype": value.dtype.name, "shape": list(value.shape[1:])}
                if len(value) != length or arrays.setdefault(key, kind) != kind:
                    fail(f"{task}: {key} {value.shape} beside {length} frames, or unlike others")
                if value.dtype.kind == "f" and not np.isfinite(value).all():
                    fail(f"{task}: NaN or infinity in {key}")
                with open(whole / f"{key}.bin", "ab") as file:
                    file.write(value.tobytes())
            records.append({"length": length, "text": text, "task": task, "split": split})
        info = {"arrays": arrays, "upside_down": upside_down, "phases": list(phases)}
        write(whole / "episodes.json", info | {"episodes": records})
        if not out.exists():  # else another process packed it meanwhile, and its set is used
            whole.rename(out)
    print(f"{out}: {len(records)} episodes, arrays {', '.join(arrays)}")


# --------------------------------------------------------------------------------- the toy world
BLOCKS = {"red": (219, 41, 41), "green": (33, 166, 61), "blue": (41, 82, 230)}
BLOCKS["yellow"] = (247, 209, 26)
TRAYS = {"white": (247, 247, 247), "black": (31, 31, 31)}
BLOCK_HALF, TRAY_HALF = 0.07, 0.15  # half sides; all lengths in widths of the table
REACH = 0.09  # how far off its centre a block is still grasped
MAX_STEP = 0.06  # of the hand in one frame at |action| = 1
TOY_LIMIT = 120  # steps of an evaluation
TOY_PHASES = ["reach", "grasp", "carry", "release", "retreat"]
# where the four blocks and the two trays lie, give or take 0.12
REGIONS = np.array([[0.2, 0.28], [0.5, 0.28], [0.8, 0.28], [0.5, 0.72], [0.2, 0.72], [0.8, 0.72]])
# (block, tray, block, tray), done in this order; every fifth is a task of the robot's
GOALS = [(a, s, b, t) for a, b in permutations(range(4), 2) for s in range(2) for t in range(2)]
TASKS = GOALS[::5]


def toy_text(goal):
    """The sentence of a goal (block, tray, block, tray)."""
    names = [[*BLOCKS, *TRAYS][i] for i in (goal[0], 4 + goal[1], goal[2], 4 + goal[3])]
    return "put the {} block on the {} tray and the {} block on the {} tray".format(*names)


class ToyWorld:
    """B tables seen from above, each with four blocks, two trays and a gripper; a seed places them.
    Positions lie in [0, 1]^2, in widths of the table, y downwards. An action (B, 3) in [-1, 1] is
    dx, dy, grip; grip > 0 closes, as in LIBERO."""

    def __init__(self, goals, seeds, look="robot", size=32):
        self.look, self.size = look, size
        tray = np.arange(6) > 3  # objects 0..3 are blocks, 4 and 5 trays
        self.goals = np.array(goals)
        self.objects = np.zeros((len(goals), 6, 2))
        self.hand = np.zeros((len(goals), 2))
        self.opening = np.ones(len(goals))
        self.held = np.full(len(goals), -1)  # the block in the hand, -1: none
        apart = 0.20 + 0.06 * (tray[:, None] | tray) - np.eye(6)  # of each two, at least
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            while (np.abs(self.objects[i][:, None] - self.objects[i]).max(-1) < apart).any():
                self.objects[i] = REGIONS + rng.uniform(-0.12, 0.12, (6, 2))
            self.hand[i] = rng.uniform(0.1, 0.9, 2)

    def step(self, actions):
        """Advance all tables by one frame; returns success, (B,) bool."""
        actions, before = np.clip(actions, -1, 1), self.hand
        close = actions[:, 2] > 0
        self.hand = np.clip(before + actions[:, :2] * MAX_STEP, 0.02, 0.98)
        self.opening = np.clip(self.opening + np.where(close, -1, 1) / 3, 0, 1)
        distance = np.abs(self.objects[:, :4] - self.hand[:, None]).max(-1)  # (B, 4)
        near = (self.held < 0) & (distance.min(1) < REACH)
        touch = close & near & (np.abs(self.opening - 1 / 3) < 0.1)
        drop = ~close & (self.opening > 0.5)
        self.held = np.where(touch, distance.argmin(1), np.where(drop, -1, self.held))
        carry = np.flatnonzero(self.held >= 0)
        self.objects[carry, self.held[carry]] += (self.hand - before)[carry]
        return self.success()

    def success(self):
        """Both blocks lie on their trays and none is held: (B,) bool."""
        rows = np.arange(len(self.held))[:, None]
        blocks = self.objects[rows, self.goals[:, ::2]]  # (B, 2, 2)
        trays = self.objects[rows, 4 + self.goals[:, 1::2]]
        return (np.abs(blocks - trays).max((1, 2)) < TRAY_HALF) & (self.held < 0)

    def proprio(self):
        """Position and opening of the hand, (B, 3)."""
        return np.concatenate([self.hand, self.opening[:, None]], 1).astype(np.float32)

    def frames(self, rows):
        """What the camera sees of these tables, (B, S, S, 3) uint8, painted back to front."""
        x, y = self.hand[rows].T
        gap = 0.10 + 0.08 * self.opening[rows]  # wide enough to be seen frame by frame at 32 x 32
        table = np.array([186, 191, 199], np.float32)[:, None, None]
        image = np.tile(table, (len(x), 1, self.size, self.size))  # (B, 3, S, S)
        for i, colour in enumerate(TRAYS.values()):
            paint(image, colour, *self.objects[rows, 4 + i].T, TRAY_HALF, TRAY_HALF)
        for top in (False, True):  # the block in the hand lies above the others
            for i, colour in enumerate(BLOCKS.values()):
                seen = (self.held[rows] == i) == top
                paint(image, colour, *self.objects[rows, i].T, BLOCK_HALF, BLOCK_HALF, seen)
        if self.look == "robot":  # a plate and two fingers
            paint(image, (204, 38, 179), x, y - 0.13, gap + 0.03, 0.04)
            finger, tip = (115, 26, 107), y
        else:  # a sleeve that comes from the table's edge, a palm, thumb and finger
            paint(image, (92, 115, 82), x, (y + 1.3) / 2, 0.05, (1.0 - y) / 2)
            paint(image, (245, 168, 128), x, y + 0.15, gap, 0.05)
            finger, tip = (224, 140, 102), y + 0.03
        paint(image, finger, x - gap, tip, 0.03, 0.095)
        paint(image, finger, x + gap, tip, 0.03, 0.095)
        return (image + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def paint(image, colour, x, y, width, height, seen=True):
    """Paint an anti-aliased box on image (B, 3, S, S) where seen; its centre (B,), half sides."""
    size = image.shape[-1]
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    across = np.reshape(width, (-1, 1)) - np.abs(grid - x[:, None])
    down = np.reshape(height, (-1, 1)) - np.abs(grid - y[:, None])
    across = np.clip(0.5 + across * size, 0, 1) * np.reshape(seen, (-1, 1))  # (B, S)
    mask = np.clip(0.5 + down * size, 0, 1)[:, :, None] * across[:, None, :]  # (B, S, S)
    colour = np.array(colour, np.float32)[:, None, None]
    image += mask[:, None].astype(np.float32) * (colour - image)


def toy_demonstrate(look, goals, seed, size):
    """Scripted demonstrations, all at once; yields (index, arrays) of those that succeed. Each has
    its own speed, the heading wanders smoothly, and now and then the hand rests."""
    n, rows = len(goals), np.arange(len(goals))
    rng = np.random.default_rng([seed, n])
    world = ToyWorld(goals, [[seed, i] for i in rows], look, size)
    speed = rng.uniform(0.65, 1.0, (n, 1)) - (0.15 if look == "hand" else 0.0)
    home = rng.uniform(0.2, 0.8, (n, 2))  # where the hand retreats to
    left = rng.integers(3, 7, n)  # frames of the retreat that are left
    part = np.zeros(n, int)  # four phases of the first block, four of the second, the retreat: 0..8
    angle = np.zeros((n, 1))  # by how much the heading is off
    rest = np.zeros(n, int)  # frames still to rest
    velocity = np.zeros((n, 2))
    film = []  # for each frame its arrays over all demonstrations
    while (left > 0).any() and len(film) < 200:
        phase = np.where(part == 8, 4, part % 4).astype(np.int8)
        second = np.minimum(part // 4, 1)  # 0: the first block, 1: the second
        block = world.objects[rows, world.goals[rows, 2 * second]]
        tray = world.objects[rows, 4 + world.goals[rows, 2 * second + 1]]
        slot = tray + np.where(second, 1, -1)[:, None] * [0.07, 0.0]  # room for two on a tray
        target = np.where((phase == 2)[:, None], world.hand + slot - block, block)
        away = np.where((phase == 4)[:, None], home, target) - world.hand
        distance = np.linalg.norm(away, axis=1, keepdims=True) + 1e-9
        moving = phase % 2 == 0
        angle = 0.85 * angle + 0.12 * rng.standard_normal((n, 1))
        tired = (rest == 0) & (rng.random(n) < 0.012) & moving
        rest = np.where(tired, rng.integers(2, 5, n), np.maximum(rest - 1, 0))
        turn = angle * np.minimum(1, distance / 0.15)
        heading = (away * np.cos(turn) + away[:, ::-1] * [-1, 1] * np.sin(turn)) / distance
        pace = np.minimum(speed, 0.7 * distance / MAX_STEP) * (rest == 0)[:, None]
        velocity = moving[:, None] * (0.4 * velocity + 0.6 * pace * heading)
        grip = np.where((phase == 1) | (phase == 2), 1, -1)[:, None]
        actions = np.concatenate([velocity, grip], 1).astype(np.float32)
        alive = np.flatnonzero(left > 0)
        parts = np.array_split(alive, 1 + len(alive) // 256)  # small enough for a cache
        frames = [frame for part in parts for frame in world.frames(part)]
        now = {"frames": dict(zip(alive, frames, strict=True))}
        now |= {"proprio": world.proprio(), "actions": actions, "truth_phase": phase}
        world.step(actions)
        now["truth_motion"] = world.proprio() - now["proprio"]
        film.append(now)
        there = moving & (distance[:, 0] < 0.05)
        shut = (phase == 1) & (world.opening < 0.01)
        opened = (phase == 3) & (world.opening > 0.99)
        part = part + ((there & (part < 8)) | shut | opened)
        velocity = velocity * ~there[:, None]
        left = left - (phase == 4)
    for i in np.flatnonzero(world.success() & (left <= 0)):
        mine = [now for now in film if i in now["frames"]]
        yield i, {key: np.stack([now[key][i] for now in mine]) for key in film[0]}


def pack_toy(out, hand=880, demos=55, size=32, seed=0):
    """Pack OUT/hand, action-free video of all goals, and OUT/robot, demos a task with actions, one
    episode in eleven held out. A set that exists already is left as it is."""
    others = [goal for goal in GOALS if goal not in TASKS]
    mixed = [TASKS[i // 2 % 10] if i % 2 else others[i // 2 % 38] for i in range(hand)]

    def episodes(look, goals):
        for i, arrays in toy_demonstrate(look, goals, 2 * seed + (look == "robot"), size):
            if look == "hand":
                del arrays["proprio"], arrays["actions"]
            split = "val" if i >= len(goals) * 10 // 11 else "train"
            yield toy_text(goals[i]), str(GOALS.index(goals[i])), split, arrays

    for look, goals in (("hand", mixed), ("robot", TASKS * demos)):
        if not Path(out, look).exists():
            pack(Path(out, look), episodes(look, goals), len(goals), phases=TOY_PHASES)


# ------------------------------------------------------------------------------------- importers
def resize(frames, size):
    """Frames, an array (T, H, W, 3) uint8 or a generator -> (T, size, size, 3), anti-aliased."""
    return np.stack([Image.fromarray(f).resize((size, size), Image.LANCZOS) for f in frames])


def natural(name):
    """A sorting key by which demo_10 comes after demo_9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", str(name))]


def libero_episodes(files, phases, args):
    """Episodes of LIBERO's HDF5, one file a task, its demonstrations in the order of their numbers.
    phases: a list, filled with the names of truth_phase, which scripted demonstrations have.
    There obs[j] was seen AFTER actions[j], so the action to learn from obs[j] is actions[j + 1]."""
    import h5py

    for path in files:
        try:
            with h5py.File(path, "r") as file:
                problem = json.loads(file["data"].attrs["problem_info"])
                text = "".join(problem["language_instruction"]).strip('"')
                demos = sorted(file["data"], key=natural)[: args.demos]
                names = json.loads(file["data"].attrs.get("phase_names", "[]"))
                names = [re.split("[:_]", name)[-1] for name in names]  # "2:knob_turn": a turn
                phases += [name for name in dict.fromkeys(names) if name not in phases]
                for i, demo in enumerate(demos):
                    obs = file["data"][demo]["obs"]
                    arrays = {"frames": resize(obs["agentview_rgb"][:-1], args.size)}
                    arrays["wrist"] = resize(obs["eye_in_hand_rgb"][:-1], args.size)
                    actions = file["data"][demo]["actions"][1:].astype(np.float32)
                    arrays["truth_actions"] = actions
                    if not args.no_actions:
                        body = [obs["joint_states"][:-1], obs["gripper_states"][:-1]]
                        arrays["proprio"] = np.concatenate(body, 1).astype(np.float32)
                        arrays["actions"] = actions
                    if names:
                        known = np.array([phases.index(name) for name in names], np.int8)
                        arrays["truth_phase"] = known[file["data"][demo]["phase"][:-1]]
                    split = "val" if i >= len(demos) - round(args.val * len(demos)) else "train"
                    yield text, path.name.removesuffix("_demo.hdf5"), split, arrays
        except (OSError, KeyError, ValueError, TypeError) as error:
            fail(f"{path}: truncated, or not in LIBERO's format ({error})")


def read_labels(path):
    """{video name: caption} of JSON or CSV with columns id (or file) and label (or text)."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        separator = ";" if ";" in text.split("\n")[0] else ","
        table = csv.DictReader(text.splitlines(), delimiter=separator)
        rows = json.loads(text) if path.endswith(".json") else list(table)
        names = [Path(str(row["file"] if "file" in row else row["id"])).stem for row in rows]
        captions = [row["text"] if "text" in row else row["label"] for row in rows]
        return dict(zip(names, captions, strict=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        fail(f"{path}: no label file with columns id and label ({type(error).__name__})")


def video_episodes(files, labels, args):
    """Episodes of video files, or of folders of images in natural order; every stride-th frame."""
    import av

    for i, path in enumerate(files):
        try:
            if path.is_dir():
                found = sorted(path.iterdir(), key=natural)
                kept = [f for f in found if f.suffix.lower() in IMAGES][:: args.stride]
                images = (np.asarray(Image.open(image).convert("RGB")) for image in kept)
                frames = resize(images, args.size)
            else:
                with av.open(str(path)) as video:
                    kept = islice(video.decode(video=0), 0, None, args.stride)
                    frames = resize((f.to_ndarray(format="rgb24") for f in kept), args.size)
        except (OSError, ValueError, IndexError) as error:  # PyAV's are OSErrors and ValueErrors
            fail(f"{path}: unreadable video ({error})")
        split = "val" if args.val and i % round(1 / args.val) == 0 else "train"
        yield labels.get(path.stem, ""), path.stem, split, {"frames": frames}


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("kind", choices=["toy", "libero", "video"], help="the toy world, LIBERO's HDF5, or videos")
    add("--out", required=True, help="folder to write; toy: makes OUT/hand and OUT/robot")
    add("--src", help="folder of .hdf5 files (libero), of .webm .mp4 .gif or image folders (video)")
    add("--size", type=number(int, 16), default=64, help="image side in pixels; toy: always 32")
    add("--demos", type=COUNT, help="libero: the first so many demonstrations of each task")
    add("--no-actions", action="store_true", help="libero: pack action-free video")
    add("--labels", help="video: captions, a CSV or JSON file")
    add("--stride", type=COUNT, default=1, help="video: keep every n-th frame")
    add("--val", type=number(float, 0, 0.5), default=0.1, help="share of episodes held out")
    args = parser.parse_args()
    if args.kind == "toy":
        if Path(args.out, "robot").exists():
            fail(f"{args.out} is packed already: delete it or choose another --out")
        return pack_toy(args.out)
    if not args.src or not Path(args.src).is_dir():
        fail(f"--src {args.src}: no such folder")
    found, phases = sorted(Path(args.src).iterdir(), key=natural), []
    if args.kind == "libero":
        files = [path for path in found if path.suffix == ".hdf5"]
        episodes = libero_episodes(files, phases, args)
    else:
        files = [path for path in found if path.suffix.lower() in VIDEOS or path.is_dir()]
        labels = read_labels(args.labels) if args.labels else {}
        episodes = video_episodes(files, labels, args)
    if not files:
        fail(f"--src {args.src}: no .hdf5 files (libero), no .webm .mp4 .gif or folders (video)")
    pack(args.out, episodes, None, args.kind == "libero", phases)


if __name__ == "__main__":
    main()
