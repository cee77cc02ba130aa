"""
What the four stages share: the packed dataset, the toy world, the importers, a few file helpers.

A packed dataset is a folder of flat arrays over all T frames of all episodes, like nanoGPT's
train.bin, and an episodes.json that says where each episode starts:
    frames.bin   (T, S, S, 3) uint8       wrist.bin    (T, S, S, 3) uint8, a second camera
    actions.bin  (T, A) float32           proprio.bin  (T, P) float32, what the body feels
    truth_*.bin  a scripted demonstrator's phase, a gripper's opening: to measure with only
All but frames may be missing: without actions it is action-free video. Stages 1 and 2 add arrays
of the same length, so frame t, its latent, its skill and its action t are the same row.

    python data.py libero --src DATASETS/libero_10 --out data/libero_10
    python data.py video  --src VIDEOS --labels captions.json --out data/videos
"""

import argparse
import atexit
import csv
import json
import math
import os
import re
import signal
import sys
import time
import zlib
from itertools import permutations
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from natsort import natsorted
from pebble import ProcessPool
from PIL import Image, ImageOps
from tqdm import tqdm

TOY_SETS = ["data/toy/hand", "data/toy/robot"]
VIDEO = re.compile(r"\.(mp4|m4v|mov|mkv|avi|webm|gif|mpg|mpeg|wmv)$", re.IGNORECASE)
IMAGE = re.compile(r"^[^.].*\.(png|jpg|jpeg|bmp|webp)$", re.IGNORECASE)  # macOS: ._a.png


# ------------------------------------------------------------------------- command line and start
def fail(message):
    """Say in one line what is wrong and leave with exit status 2. Tracebacks are for bugs."""
    print(f"error: {' '.join(message.split())[:500]}", file=sys.stderr)
    raise SystemExit(2)


def number(kind, least, most=math.inf, step=0):
    """An argparse type: int or float from least to most, both included; multiples of step."""

    def parse(text):
        value = kind(text)
        if not (math.isfinite(value) and least <= value <= most) or (step and value % step):
            raise argparse.ArgumentTypeError(f"{text} is not from {least} to {most}{steps}")
        return value

    steps = f" in steps of {step}" if step else ""
    parse.__name__ = kind.__name__  # for argparse: "invalid int value"
    return parse


COUNT, SEED, WIDTH = number(int, 1), number(int, 0, 2**32 - 1), number(int, 8, step=8)
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
        add("--seed", type=SEED, default=0, help="same seed and threads, same result")
        add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
        add("--log-every", type=COUNT, default=100, help="steps between lines of log, checkpoints")
    return parser


def interrupted(*_):
    fail("stopped: start the same command again to go on")


def start(device):
    """Join the processes that torchrun started; returns the torch.device that --device names, the
    rank of this process (only rank 0 writes to OUT) and how many there are."""
    signal.signal(signal.SIGINT, interrupted)  # Ctrl-C
    signal.signal(signal.SIGTERM, interrupted)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if device == "cuda" else device
    if name not in ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]:
        fail(f"--device {device}: no such device here; use --device cpu")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("nccl" if "cuda" in name else "gloo")
    return torch.device(name), int(os.environ.get("RANK", 0)), world


# ----------------------------------------------------------------------------- files and pictures
def write(path, content):
    """Write .npy, .pt, .png (a figure), text or JSON; until it is whole the old file stays."""
    ending = Path(path).suffix
    new = Path(f"{path}.tmp")
    try:
        with open(new, "wb") as file:
            if ending == ".npy":
                np.save(file, content)
            elif ending == ".pt":
                torch.save(content, file)
            elif ending == ".png":
                content.savefig(file, format="png")
            else:
                text = content if isinstance(content, str) else json.dumps(content, indent=1)
                file.write(text.encode(errors="backslashreplace"))
        os.replace(new, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch makes of an OSError
        fail(f"{path} cannot be written and stays as it was ({error})")
    finally:
        new.unlink(missing_ok=True)


def claim(path, wait=False):
    """Lock path for this process; where another one has it, wait or exit. Returns the lock."""
    try:
        lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=wait)
        Path(lock.lock_file).write_text(str(os.getpid()))
    except Timeout:
        holder = Path(lock.lock_file).read_text()
        fail(f"process {holder} is writing {path}: wait for it, or choose another --out")
    except (OSError, ValueError) as error:  # ValueError: path has no name
        fail(f"{path} cannot be written ({error})")
    atexit.register(lock.release)  # keeps a reference: without one the lock would end
    return lock


def add_to_log(stem, log, seen, first, begin):
    """Add the mean of the last steps' values, seen (dicts with a key step), to log, a list of such
    rows; print it; write STEM_log.csv and its curves, STEM_log.png. first, begin: the step and the
    time at which this run began."""
    row = {key: float(np.mean([values[key] for values in seen])) for key in seen[0]}
    row["step"] = seen[-1]["step"]
    log.append(row)
    names = [key for key in row if key != "step"]
    text = "   ".join(f"{name} {row[name]:.3f}" for name in names)
    speed = (row["step"] - first) / (time.time() - begin)
    tqdm.write(f"{Path(stem).name} step {row['step']:6d}   {text}   {speed:.1f} steps/s")
    lines = [",".join(row)] + [",".join(f"{x:.6g}" for x in row.values()) for row in log]
    write(f"{stem}_log.csv", "\n".join(lines) + "\n")
    figure = Figure((4 * len(names), 3.2), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        axis.plot([row["step"] for row in log], [row[name] for row in log])
        axis.set(xlabel="training step", title=name)
        axis.grid(alpha=0.3)
    write(f"{stem}_log.png", figure)


def stop_unless_finite(norm, step, path):
    """Exit before a step whose gradient has a norm that is not finite; path stays as it is."""
    if not math.isfinite(norm):
        fail(f"step {step + 1}: the gradient is {norm}: try a lower --lr; {path} stays as it was")


def checksum(*arrays):
    """Checksum of up to a thousand rows of each array: other data are noticed, one row may not."""
    parts = [array[:: 1 + len(array) // 1000].tobytes() for array in arrays]
    return zlib.crc32(b"".join(parts))


def file_checksum(path):
    """Checksum of a file, 0 where there is none."""
    return zlib.crc32(path.read_bytes()) if os.path.exists(path) else 0


def load_checkpoint(path, stage, finished=True):
    """A stage's checkpoint, a dict; exits when it is missing, damaged, another's or unfinished."""
    again = f"run `python {stage.split('_')[0]}.py` with the same --out"
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        found, complete = record["stage"], record["step"] >= record["steps"]
    except Exception as error:
        fail(f"{path} is missing or damaged ({type(error).__name__}): delete it, {again}")
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


def resume(path, stage, settings, model, optimizer, made):
    """Load model and optimizer from the checkpoint at path; returns its step and log, or 0 and [].
    Exits when settings, what decides the result, have changed, or another process writes path.
    made: a pattern of the report's files that must not outlive a new training."""
    record = {"step": 0, "steps": 1, "log": []}
    if os.path.exists(path):
        record = load_checkpoint(path, stage, finished=False)
        for key, new in settings.items():
            old = record["settings"].get(key)
            if old != new and key not in ("out", "device", "log_every"):
                fail(f"{path} was trained with {key} {old}, not {new}: choose another --out")
        load_weights(model, record, path)
        optimizer.load_state_dict(record["optimizer"])
    finished = record["step"] >= record["steps"]
    if int(os.environ.get("RANK", 0)) == 0 and not (finished and stage == "policy_pretrain"):
        claim(path)  # a finished pretraining is only read, perhaps by several runs at once
        if not finished:
            for old in path.parent.glob(made):
                old.unlink()
    return record["step"], record["log"]


# ------------------------------------------------------------------------------ the packed dataset
class Packed:
    """A packed dataset, memory-mapped: frames, wrist, proprio and actions over all T rows, None
    where it has none; start, length and splits (E,): each episode's first row, number of rows, and
    train or val; last (T,), the last row of each row's episode."""

    def __init__(self, path):
        self.path = Path(path)
        self.name = self.path.name
        try:
            info = json.loads((self.path / "episodes.json").read_text())
            self.arrays, self.episodes = info["arrays"], info["episodes"]
            self.length = np.array([episode["length"] for episode in self.episodes])
            self.splits = np.array([episode["split"] for episode in self.episodes])
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{path} is no packed dataset; data.py makes one, see `python data.py --help`")
        self.start = self.length.cumsum() - self.length
        self.last = np.repeat(self.start + self.length - 1, self.length)
        self.total = len(self.last)
        self.frames, self.wrist = self.open("frames"), self.open("wrist")
        self.proprio, self.actions = self.open("proprio"), self.open("actions")

    def open(self, key):
        """An array of the set by its name, or None; exits when its file has a wrong size."""
        if key not in self.arrays:
            return None
        file = self.path / f"{key}.bin"
        try:
            rows = np.memmap(file, self.arrays[key]["dtype"], "r")
            return rows.reshape(self.total, *self.arrays[key]["shape"])
        except (OSError, ValueError) as error:
            fail(f"{file} is missing, or not as episodes.json says ({error})")

    def checksum(self, *others):
        """Checksum of images, lengths and splits, which decide the latents, and other arrays."""
        known = [self.open(key) for key in ("frames", "wrist", *others) if key in self.arrays]
        parts = list(zip(self.length.tolist(), self.splits.tolist(), strict=True))
        return zlib.crc32(json.dumps(parts).encode(), checksum(*known))

    def split(self, name):
        """Numbers of the episodes of a split, train or val; where no episode is held out, all."""
        chosen = np.flatnonzero(self.splits == name)
        return chosen if len(chosen) else np.arange(len(self.splits))

    def rows(self, episodes, gap=0):
        """The rows t of these episodes for which t + gap lies in the same episode."""
        ends = self.start + self.length - gap
        return np.concatenate([np.arange(self.start[e], ends[e]) for e in episodes])


def open_sets(paths):
    """Packed datasets, checked to fit each other. The toy world is packed when it is missing."""
    if any(path in TOY_SETS and not os.path.exists(path) for path in paths):
        pack_toy("data/toy")
    sets = [Packed(path) for path in paths]
    if len({dataset.name for dataset in sets}) < len(sets):
        fail("two datasets of the same name: latents are filed by folder name, so rename one")
    for key in ("frames", "actions", "proprio"):
        shapes = {d.name: d.arrays[key]["shape"] for d in sets if key in d.arrays}
        if len(set(map(str, shapes.values()))) > 1:
            fail(f"{key} differ in shape, as of different robots or --size: {shapes}")
    for dataset in sets:
        if len(set(dataset.splits)) == 1:
            print(f"{dataset.name}: all are {dataset.splits[0]}: trained on, and measured on")
    return sets


def check_array(key, value, frames, where):
    """Exit unless an episode's array is what the stages expect beside its frames."""
    right = key.startswith("truth_")
    if key in ("frames", "wrist"):
        side = frames.shape[1] if frames.ndim == 4 else 0
        right = value.dtype == np.uint8 and value.shape[1:] == (side, side, 3)
    if key in ("proprio", "actions"):
        right = value.dtype == np.float32 and value.ndim == 2 and np.isfinite(value).all()
    if not right or len(value) != len(frames) or value.size == 0:
        expected = "only frames, wrist uint8 (T, S, S, 3); proprio, actions float32 (T, D), no NaN"
        fail(f"{where}: {key} {value.dtype} {value.shape} beside {len(frames)} frames; {expected}")


def pack(out, episodes, total=None, skipped=()):
    """Pack episodes, each (text, task, split, {name: array over its frames}), into a folder; total:
    how many. Exits when arrays do not fit each other, or hold NaN. skipped: for OUT/skipped.txt."""
    out = Path(out)
    part = Path(f"{out}.part")
    claim(out)
    if out.exists():
        fail(f"{out} exists already: delete it or choose another --out")
    arrays, records = {}, []
    try:
        rmtree(part, ignore_errors=True)  # left by a packing that was killed
        part.mkdir()
        for text, task, split, episode in tqdm(episodes, str(out), total, disable=None):
            where = f"{task}, episode {len(records)}"
            episode = {key: np.asarray(value) for key, value in ({"frames": []} | episode).items()}
            frames, kinds = episode["frames"], {}
            for key, value in episode.items():
                check_array(key, value, frames, where)
                kinds[key] = {"dtype": value.dtype.str, "shape": list(value.shape[1:])}
                with open(part / f"{key}.bin", "ab") as file:
                    file.write(value.tobytes())
            arrays = arrays or kinds
            if kinds != arrays:
                fail(f"{where}: arrays {kinds} are not as before: {arrays}")
            if split not in ("train", "val") or not isinstance(text or "", str):
                fail(f"{where}: {split!r} is neither train nor val, or {text!r} is no str")
            record = {"length": len(frames), "text": text or "", "split": split}
            records.append(record | {"task": str(task)})
        if not records:
            fail(f"{out}: nothing could be read: {'; '.join(skipped)}")
        if skipped:
            write(part / "skipped.txt", "\n".join(skipped) + "\n")
        write(part / "episodes.json", {"arrays": arrays, "episodes": records})
        part.rename(out)
    except OSError as error:
        fail(f"{out} cannot be written, or an episode not be read ({error})")
    finally:
        rmtree(part, ignore_errors=True)
    print(f"{out}: {len(records)} episodes, arrays {', '.join(arrays)}; {len(skipped)} problems")


# --------------------------------------------------------------------------------- the toy world
BLOCKS = {"red": (219, 41, 41), "green": (33, 166, 61), "blue": (41, 82, 230)}
BLOCKS["yellow"] = (247, 209, 26)
TRAYS = {"white": (247, 247, 247), "black": (31, 31, 31)}
BLOCK_HALF, TRAY_HALF = 0.07, 0.15  # half sides; all lengths in widths of the table
REACH = 0.09  # how far off its centre a block is still grasped
MAX_STEP = 0.06  # of the hand in one frame at |action| = 1
TOY_SIZE = 32  # side of a frame in pixels
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
    """B tables seen from above, each with four blocks, two trays and a hand; a seed places them.
    Positions lie in [0, 1]^2, in widths of the table, y downwards. An action (B, 3) in [-1, 1] is
    dx, dy, grip; grip > 0 closes, as in LIBERO."""

    def __init__(self, goals, seeds, look="robot"):
        self.look = look
        self.goals = np.array(goals)
        self.hand = np.ones((len(goals), 3))  # x, y and opening: the proprio
        self.objects = np.zeros((len(goals), 6, 2))  # 0..3 are blocks, 4 and 5 trays
        self.held = np.full(len(goals), -1)  # the block in the hand, -1: none
        tray = np.arange(6) > 3
        apart = np.where(tray[:, None] | tray, 0.26, 0.20) - np.eye(6)  # least; none to itself
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            while (np.abs(self.objects[i][:, None] - self.objects[i]).max(-1) < apart).any():
                self.objects[i] = REGIONS + rng.uniform(-0.12, 0.12, (6, 2))
            self.hand[i, :2] = rng.uniform(0.1, 0.9, 2)

    def step(self, actions):
        """Advance all tables by one frame; returns success, (B,) bool."""
        actions, before = np.clip(actions, -1, 1), self.hand
        close = actions[:, 2] > 0
        change = np.column_stack([actions[:, :2] * MAX_STEP, np.where(close, -1, 1) / 3])
        self.hand = np.clip(before + change, [0.02, 0.02, 0], [0.98, 0.98, 1])
        opening = self.hand[:, 2]
        distance = np.abs(self.objects[:, :4] - self.hand[:, None, :2]).max(-1)  # (B, 4)
        near = (self.held < 0) & (distance.min(1) < REACH)
        touch = close & near & (np.abs(opening - 1 / 3) < 0.1)  # a closed hand grasps nothing
        drop = ~close & (opening > 0.5)
        self.held = np.where(touch, distance.argmin(1), np.where(drop, -1, self.held))
        carry = np.flatnonzero(self.held >= 0)
        self.objects[carry, self.held[carry]] += (self.hand - before)[carry, :2]
        # success: both blocks lie on their trays and none is held
        rows = np.arange(len(self.held))[:, None]
        blocks = self.objects[rows, self.goals[:, ::2]]  # (B, 2, 2)
        trays = self.objects[rows, 4 + self.goals[:, 1::2]]
        return (np.abs(blocks - trays).max((1, 2)) < TRAY_HALF) & (self.held < 0)

    def frames(self, rows):
        """What the camera sees of these tables, painted back to front: (B, S, S, 3) uint8."""
        objects, held = self.objects[rows], self.held[rows]
        x, y, opening = self.hand[rows].T
        gap = 0.10 + 0.08 * opening  # wide enough to be seen frame by frame at 32 x 32
        table = np.array([186, 191, 199], np.float32)[:, None, None]
        image = np.tile(table, (len(x), 1, TOY_SIZE, TOY_SIZE))  # (B, 3, S, S)
        for i, colour in enumerate(TRAYS.values()):
            paint(image, colour, *objects[:, 4 + i].T, TRAY_HALF, TRAY_HALF)
        for top in (False, True):  # the block in the hand lies above the others
            for i, colour in enumerate(BLOCKS.values()):
                paint(image, colour, *objects[:, i].T, BLOCK_HALF, BLOCK_HALF, (held == i) == top)
        if self.look == "robot":  # a plate and two fingers
            paint(image, (204, 38, 179), x, y - 0.13, gap + 0.03, 0.04)
            finger, tip = (115, 26, 107), y
        else:  # a sleeve that comes from the table's edge, a palm, thumb and finger
            paint(image, (92, 115, 82), x, (y + 1.3) / 2, 0.05, (1.0 - y) / 2)
            paint(image, (245, 168, 128), x, y + 0.15, gap, 0.05)
            finger, tip = (224, 140, 102), y + 0.03
        for side in (-gap, gap):
            paint(image, finger, x + side, tip, 0.03, 0.095)
        return (image + 0.5).astype(np.uint8).transpose(0, 2, 3, 1)


def paint(image, colour, x, y, width, height, seen=True):
    """Paint an anti-aliased box on image (B, 3, S, S) where seen; its centre (B,), half sides."""
    grid = (np.arange(TOY_SIZE, dtype=np.float32) + 0.5) / TOY_SIZE
    across = np.reshape(width, (-1, 1)) - np.abs(grid - x[:, None])
    down = np.reshape(height, (-1, 1)) - np.abs(grid - y[:, None])
    across = np.clip(0.5 + across * TOY_SIZE, 0, 1) * np.reshape(seen, (-1, 1))  # (B, S)
    mask = np.clip(0.5 + down * TOY_SIZE, 0, 1)[:, :, None] * across[:, None, :]  # (B, S, S)
    colour = np.array(colour, np.float32)[:, None, None]
    image += mask[:, None].astype(np.float32) * (colour - image)


def toy_demonstrate(look, goal, seed):
    """The arrays of a scripted demonstration, at its own speed, wandering, now and then at rest."""
    world = ToyWorld([goal], [seed], look)
    rng = np.random.default_rng([*seed, 1])
    speed = rng.uniform(0.65, 1.0) - (0.15 if look == "hand" else 0.0)
    home = rng.uniform(0.2, 0.8, 2)  # where the hand retreats to
    angle, rest = 0.0, 0  # radians off the straight line; frames that it still rests
    velocity = np.zeros(2)
    film = []
    plan = [(block, phase) for block in (0, 1) for phase in ("reach", "grasp", "carry", "release")]
    plan += [(1, "retreat")] * int(rng.integers(3, 7))  # one for each frame of it
    while plan:
        block, phase = plan[0]
        hand, thing = world.hand[0, :2], world.objects[0, goal[2 * block]]
        tray = world.objects[0, 4 + goal[2 * block + 1]]
        slot = tray + [(-0.07, 0.07)[block], 0]  # the first block's is on the left
        # the way still to go: of the block to its slot, of the hand home, of the hand to the block
        away = {"carry": slot - thing, "retreat": home - hand}.get(phase, thing - hand)
        distance = math.hypot(*away) + 1e-9
        moving = phase not in ("grasp", "release")
        angle = 0.85 * angle + 0.12 * rng.standard_normal()
        tired = moving and rest == 0 and rng.random() < 0.012
        rest = int(rng.integers(2, 5)) if tired else max(rest - 1, 0)
        turn = angle * min(1, distance / 0.15)
        rotation = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
        pace = 0 if rest else min(speed, 0.7 * distance / MAX_STEP)
        velocity = moving * (0.4 * velocity + 0.6 * pace * (rotation @ away) / distance)  # dx, dy
        action = np.array([*velocity, 1 if phase in ("grasp", "carry") else -1], np.float32)
        film.append((world.hand[0], world.objects[0].copy(), world.held[0], action, phase))
        world.step(action[None])
        done = {"grasp": world.hand[0, 2] < 0.01, "release": world.hand[0, 2] > 0.99}
        if done.get(phase, distance < 0.05) or phase == "retreat":
            plan.pop(0)
    # all frames are drawn at once, each as a table of its own
    world.hand, world.objects, world.held, actions, phases = map(np.array, zip(*film, strict=True))
    arrays = {"frames": world.frames(slice(None)), "truth_phase": phases.astype(bytes)}
    if look == "robot":  # a hand's video is free of actions
        arrays |= {"proprio": world.hand.astype(np.float32), "actions": actions}
        arrays["truth_opening"] = arrays["proprio"][:, 2]
    return arrays


def toy_episodes(look, goals):
    """Demonstrations of these goals, one in eleven held out."""
    for i, goal in enumerate(goals):
        arrays = toy_demonstrate(look, goal, [int(look == "robot"), i])
        split = "val" if i >= len(goals) * 10 // 11 else "train"
        yield toy_text(goal), str(GOALS.index(goal)), split, arrays


def pack_toy(out, hand=880, demos=55):
    """Pack hand videos, and demos demonstrations of each task by a robot, where missing."""
    others = [goal for goal in GOALS if goal not in TASKS]
    mixed = [TASKS[i // 2 % 10] if i % 2 else others[i // 2 % 38] for i in range(hand)]
    lock = claim(Path(out, "sets"), wait=True)  # of two first runs, as torchrun's, one packs
    for look, goals in (("hand", mixed), ("robot", TASKS * demos)):
        if not Path(out, look).exists():
            pack(Path(out, look), toy_episodes(look, goals), len(goals))
    lock.release()


# ------------------------------------------------------------------------------------- importers
def resize(images, size, fit="crop"):
    """PIL images or uint8 arrays (H, W, 3) -> (T, size, size, 3) uint8, anti-aliased; of one that
    is not square the middle is kept (crop), or all of it, squeezed (squash)."""
    shrink = ImageOps.fit if fit == "crop" else Image.Image.resize
    images = (x if isinstance(x, Image.Image) else Image.fromarray(x) for x in images)
    return np.stack([shrink(x.convert("RGB"), (size, size), Image.LANCZOS) for x in images])


def libero_episodes(args, skipped):
    """Episodes of LIBERO's HDF5, one file a task, its demonstrations in the order of their numbers.
    There obs[j] was seen AFTER actions[j], so the action to learn from obs[j] is actions[j + 1]."""
    import h5py

    files, beyond = natsorted(Path(args.src).rglob("*.hdf5"), key=str), 0
    if not files:
        fail(f"--src {args.src}: no .hdf5 files there")
    for path in files:
        name = ""
        try:
            with h5py.File(path) as file:
                problem = json.loads(file["data"].attrs["problem_info"])
                text = "".join(problem["language_instruction"]).strip('" ')
                names = natsorted(file["data"])[: args.demos]
                if not names or not text:
                    skipped.append(f"{path.name}: no demonstrations, or no sentence")
                    continue
                for i, name in enumerate(names):
                    demo = file["data"][name]
                    if len(demo["actions"]) < 3:  # one is lost, as actions[0] has no frame
                        skipped.append(f"{path.name} {name}: too short")
                        continue
                    arrays = libero_arrays(demo, args.size)
                    beyond += int((np.abs(arrays["actions"]) > 1).sum())
                    split = "val" if i >= len(names) - round(args.val * len(names)) else "train"
                    yield text, path.name.removesuffix("_demo.hdf5"), split, arrays
        except Exception as error:  # h5py raises many kinds
            fail(f"{path} {name}: truncated, or not in LIBERO's format ({error})")
    if beyond:
        print(f"{beyond} numbers of actions lie beyond [-1, 1]; they are kept")


def libero_arrays(demo, size):
    """The arrays of a demonstration; a scripted one tells the name of each frame's phase too."""
    obs, arrays = demo["obs"], {}
    for key, camera in (("frames", "agentview_rgb"), ("wrist", "eye_in_hand_rgb")):
        if key == "frames" or camera in obs:  # where images are stored upside down
            arrays[key] = resize(obs[camera][:-1][:, ::-1], size)
    joints, fingers = obs["joint_states"][:-1], obs["gripper_states"][:-1]
    arrays["proprio"] = np.concatenate([joints, fingers], 1).astype(np.float32)
    arrays["truth_opening"] = (fingers[:, 0] - fingers[:, 1]).astype(np.float32)
    arrays["actions"] = demo["actions"][1:].astype(np.float32)
    phases = json.loads(demo.parent.attrs.get("phase_names", "[]"))
    if phases:
        short = [re.split("[:_]", phase)[-1] for phase in phases]  # "2:knob_turn": a turn
        arrays["truth_phase"] = np.array(short, "S32")[demo["phase"][:-1]]
    return arrays


def read_captions(path, names):
    """The captions of clips of these names, "" where there is none: from a JSON object, or from
    rows with columns id and label, in CSV or JSON."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if path.lower().endswith(".json"):
            rows = json.loads(text)
        else:
            separator = max(",;\t", key=text.split("\n")[0].count)
            rows = list(csv.DictReader(text.splitlines(keepends=True), delimiter=separator))
            if any(None in row for row in rows):
                raise ValueError("a row is longer than the first: put captions in quotes")
        if isinstance(rows, list):
            rows = {row["id"]: row["label"] for row in rows}
        found = {VIDEO.sub("", str(key)): x for key, x in rows.items() if isinstance(x, str)}
    except Exception as error:
        fail(f"{path}: no captions with columns id and label ({type(error).__name__} {error})")
    captions = [found.get(name, found.get(Path(name).name, "")) for name in names]
    if not any(captions):
        fail(f"{path} has captions of {list(found)[:1]}, but the first clip is {names[0]!r}")
    print(f"captions for {sum(map(bool, captions))} of {len(names)} videos")
    return captions


def read_clip(path, args):
    """A list of the frames (size, size, 3) of a video, as far as it can be read, or of a folder of
    images in natural order; what is wrong with it, or ""; its frames a second, or 0. With --fps, of
    each moment the first image at or after it, by the video's own time stamps."""
    import av

    frames, problem, rate = [], "", 0
    try:
        if path.is_dir():
            for file in natsorted(path.iterdir(), key=str):
                if IMAGE.search(file.name):
                    image = ImageOps.exif_transpose(Image.open(file))
                    if image.mode[0] in "IF":  # Pillow would make them white
                        raise ValueError(f"{file.name} has more than 8 bits a colour")
                    frames += [*resize([image], args.size, args.fit)]
        else:
            video = av.open(str(path))
            stream = video.streams.video[0]
            rate = round(float(stream.average_rate or 0))
            times = []
            for frame in video.decode(video=0):
                times.append(frame.time or 0)  # 0: it has no time stamps
                seconds = times[-1] - times[0]
                due = int(seconds * args.fps + 1e-6) + 1 if args.fps else len(frames) + 1
                if due > len(frames):
                    image = frame.to_image().rotate(frame.rotation, expand=True)  # upright
                    frames += [*resize([image], args.size, args.fit)] * (due - len(frames))
            promised = (video.duration or 0) / 1e6  # seconds
            if stream.duration:  # of the picture; the sound may last longer
                promised = float(stream.duration * stream.time_base)
            if times and 0.9 * promised > times[-1] - times[0] + 1:
                raise ValueError(f"its header promises {promised:.1f} seconds")
    except Exception as error:  # PyAV and Pillow raise many kinds
        problem = f"unreadable after {len(frames)} frames ({error})"
    if len(frames) < 2 and not problem:
        problem = "fewer than two frames"
    return frames, problem, rate


def video_episodes(args, skipped):
    """Episodes of video files and image folders, named by path; problems are added to skipped."""
    root = Path(args.src)
    found = [root, *natsorted(root.rglob("*"), key=str)]
    skipped += [f"{x}: a link to a folder" for x in found[1:] if x.is_symlink() and x.is_dir()]
    folders = {path.parent for path in found if IMAGE.search(path.name)}
    folders -= {path.parent for path in found if VIDEO.search(path.name)}  # there, thumbnails
    files = [path for path in found if VIDEO.search(path.name) or path in folders]
    if not files:
        fail(f"--src {args.src}: no .mp4 or other videos there, no folders of .png or other images")
    names = [VIDEO.sub("", str(x.relative_to(root)) if x != root else x.name) for x in files]
    captions = read_captions(args.labels, names) if args.labels else [""] * len(names)
    rates = set()
    ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for this process
    pool = ProcessPool(args.workers, initializer=signal.signal, initargs=ignore)
    try:
        for begin in range(0, len(files), 16):  # a few at a time, so that memory stays flat
            clips = [pool.schedule(read_clip, (path, args)) for path in files[begin : begin + 16]]
            for i, clip in enumerate(clips, begin):
                died = clip.exception()  # as a decoder may
                crash = [], f"its reader died ({died})", 0
                frames, problem, rate = crash if died else clip.result()
                rates.add(rate)
                if problem:
                    skipped.append(f"{names[i]}: {problem}")
                if len(frames) > 1:
                    held_out = math.ceil((i + 1) * args.val) > math.ceil(i * args.val)
                    split = "val" if held_out else "train"
                    yield captions[i], names[i], split, {"frames": np.stack(frames)}
    finally:
        pool.stop()
        pool.join()
    rates -= {0}  # of images, of what could not be opened
    if len(rates) > 1 and not args.fps:
        print(f"{sorted(rates)} frames a second are mixed: --fps makes a gap of k one time")


def main():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("kind", choices=["libero", "video"], help="what to read: LIBERO's HDF5, or videos")
    add("--src", required=True, help="folder of .hdf5 files, or of videos and folders of images")
    add("--out", required=True, help="folder to write")
    add("--size", type=number(int, 16, step=16), default=64, help="image side in pixels")
    add("--demos", type=COUNT, help="libero: the first so many demonstrations of each task")
    add("--labels", help="video: captions, a CSV or JSON file")
    add("--fps", type=number(float, 0.1), help="video files: frames a second, if not theirs")
    add("--fit", choices=["crop", "squash"], default="crop", help="video: the middle, or squeezed")
    add("--workers", type=COUNT, default=os.cpu_count(), help="video: processes that decode")
    add("--val", type=number(float, 0, 0.5), default=0.1, help="share of the episodes held out")
    args = parser.parse_args()
    start("cpu")
    skipped = []
    episodes = libero_episodes if args.kind == "libero" else video_episodes
    pack(args.out, episodes(args, skipped), skipped=skipped)


if __name__ == "__main__":
    main()
