"""
What the four stages share: the packed dataset, the built-in toy world, the importers, and the checkpoint and log helpers.

A packed dataset is a folder of flat arrays over all frames of all episodes, like nanoGPT's train.bin, and an episodes.json:
    frames.bin (T, H, W, 3) uint8      wrist.bin (T, H, W, 3) uint8      proprio.bin (T, P) float32      actions.bin (T, A) float32
    truth_*.bin   what the toy world or a scripted demonstrator knows (phase, motion, layout): for measuring only, never for training
All but frames may be missing: a folder without actions is action-free video. Every stage memory-maps the arrays and adds one more of the
same length T, so frame t, its latent t, its skill t and its action t are the same row everywhere.

    python data.py toy    --out data/toy                                     # the built-in world, half a minute
    python data.py libero --src ~/LIBERO/datasets/libero_10 --out data/libero_10 --size 128
    python data.py video  --src ssv2/videos --labels ssv2/train.json --out data/ssv2 --size 128
"""
import argparse, csv, itertools, json, os, shutil, sys, zlib
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

RANK, WORLD = (int(os.environ.get(key, one)) for key, one in (("RANK", 0), ("WORLD_SIZE", 1)))    # set by torchrun, see lam.setup()
PHASES = ["reach", "grasp", "carry", "release", "retreat"]     # the toy world's true skills, in truth_phase.bin
LIBERO_PHASES = PHASES + ["descend", "lift", "lower", "hold", "turn", "push", "back", "insert"]         # of scripted LIBERO demonstrations
TOY_SETS = ["data/toy/hand", "data/toy/robot"]

# ---------------------------------------------------------------- errors and files
def fail(message):
    """Say in one line what is wrong, and leave with exit status 2. Tracebacks are for bugs."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)

def write(path, content):
    """Write JSON, a numpy array, a picture or a checkpoint, by the path's ending; renamed when whole, so nobody ever sees half a file."""
    if RANK:
        return                                                                 # of several processes only the first one writes
    writers = {".json": lambda file: file.write(json.dumps(content, indent=1).encode()), ".npy": lambda file: np.save(file, content),
               ".pt": lambda file: torch.save(content, file), ".png": lambda file: content.save(file, format="png")}
    with open(f"{path}.tmp", "wb") as file:
        writers[Path(path).suffix](file)
    os.replace(f"{path}.tmp", path)

def load_checkpoint(path, stage, finished=True):
    """A stage's checkpoint. Exits when it is missing, damaged, another stage's, or (if finished is asked for) not trained to its end."""
    script = f"{stage.split('_')[0]}.py"
    try:
        record = torch.load(path, map_location="cpu", weights_only=True)
        found, step, steps = record["stage"], record["step"], record["args"]["steps"]
    except FileNotFoundError:
        fail(f"{path} is missing: run `python {script}` with the same --out first")
    except Exception as error:
        fail(f"{path} is not a readable checkpoint of this project ({type(error).__name__})")
    if found != stage or finished and step < steps:
        fail(f"{path} is a checkpoint of {found}, not of {stage}" if found != stage else
             f"{path} stopped at step {step} of {steps}: run `python {script}` again to finish it")
    return record

def load_weights(model, record, path):
    try:
        model.load_state_dict(record["model"])
    except RuntimeError as error:
        fail(f"{path} holds a model of another shape: {str(error).splitlines()[1].strip()[:160]}")

def fingerprint(*arrays):
    """Checksum of a thousand rows of each array (len, ...): a checkpoint is not continued on other data than it was begun on."""
    return zlib.crc32(b"".join(np.ascontiguousarray(a[::1 + len(a) // 1000]).tobytes() for a in arrays))

# ---------------------------------------------------------------- the packed dataset
class Packed:
    """A packed dataset, memory-mapped. frames, wrist, proprio, actions: arrays over all T frames, or None; start, length: (E,)."""
    def __init__(self, path):
        self.path, self.name = Path(path), Path(path).name
        try:
            info = json.loads((self.path / "episodes.json").read_text())
            self.arrays, self.episodes, self.upside_down, self.phases = map(info.get, ("arrays", "episodes", "upside_down", "phases"))
            self.start, self.length = (np.array([e[key] for e in self.episodes], int) for key in ("start", "length"))
        except (OSError, ValueError, KeyError, TypeError):
            fail(f"{path}: no packed dataset (no readable episodes.json); data.py makes one, see `python data.py --help`")
        self.total = int(self.length.sum())
        self.frames, self.wrist, self.proprio, self.actions = map(self.open, ("frames", "wrist", "proprio", "actions"))
    def open(self, key):
        if key not in self.arrays:
            return None
        dtype, shape = np.dtype(self.arrays[key]["dtype"]), tuple(self.arrays[key]["shape"])
        file, need = self.path / f"{key}.bin", self.total * int(np.prod(shape)) * dtype.itemsize
        if not file.exists() or file.stat().st_size != need:
            fail(f"{file}: {file.stat().st_size if file.exists() else 0} bytes, but {self.total} frames by episodes.json need {need}")
        return np.memmap(file, dtype, "r", shape=(self.total,) + shape)
    def truth(self, key):                                                      # phase, motion, layout: for reports, never for training
        return self.open(f"truth_{key}")
    def split(self, name):                                                     # where no episode is held out, val is all of them
        return np.array([i for i, e in enumerate(self.episodes) if e["split"] == name] or range(len(self.episodes)))
    def rows(self, episodes, gap=0):
        """Flat rows t of these episodes for which t + gap lies in the same episode."""
        return np.concatenate([np.arange(s, s + max(0, n - gap)) for s, n in zip(self.start[episodes], self.length[episodes])])
    def chosen(self, demos):
        """Training episodes to use: the first `demos` of every task, or that share of them when it is a float (at least one)."""
        tasks, e = np.array([e["task"] for e in self.episodes]), self.split("train")
        groups = [e[tasks[e] == task] for task in np.unique(tasks[e])]
        return np.sort(np.concatenate([x[:max(1, round(demos * len(x))) if isinstance(demos, float) else demos] for x in groups]))

def standardise(arrays, rows):
    """Arrays of several sets, jointly standardised over the given rows of each; their mean and their standard deviation."""
    mean, scale = (used := np.concatenate([a[r] for a, r in zip(arrays, rows)])).mean(0), used.std(0) + 1e-6
    return [((a - mean) / scale).astype(np.float32) for a in arrays], torch.from_numpy(mean), torch.from_numpy(scale)

def open_sets(paths):
    """Packed datasets, checked to fit each other. The toy world is packed when its two default folders are asked for and missing."""
    if list(paths) == TOY_SETS and not RANK:
        pack_toy("data/toy")
    WORLD > 1 and torch.distributed.barrier()
    sets = [Packed(p) for p in paths]
    if len({s.name for s in sets}) < len(sets):
        fail("two datasets of the same name: latents and skills are filed by folder name, so rename one")
    if len({s.frames.shape[1:] for s in sets}) > 1:
        fail("datasets of different frame size: " + ", ".join(f"{s.path} {s.frames.shape[1:3]}" for s in sets))
    return sets

def pack(out, episodes, total=None, upside_down=False, phases=PHASES):
    """Write a packed dataset from (text, task, split, {name: array over the episode's frames}); it appears only when it is whole."""
    out, tmp = Path(out), Path(f"{out}.tmp")
    if out.exists():
        fail(f"{out} exists already: delete it or choose another --out")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    arrays, records, start = {}, [], 0
    for text, task, split, episode in tqdm(episodes, str(out), total, disable=None):
        for key, value in episode.items():
            if len(value) != len(episode["frames"]):
                fail(f"{task}: {len(episode['frames'])} frames but {len(value)} rows of {key}")
            if value.dtype.kind == "f" and not np.isfinite(value).all():
                fail(f"{task}: NaN or infinity in {key}")
            spec = dict(dtype=value.dtype.name, shape=list(value.shape[1:]))
            if arrays.setdefault(key, spec) != spec:
                fail(f"{task}: {key} is {spec}, in other episodes {arrays[key]}")
            with open(tmp / f"{key}.bin", "ab") as file:
                file.write(np.ascontiguousarray(value).tobytes())
        records.append(dict(start=start, length=len(value), text=text, task=task, split=split))
        start += len(value)
    write(tmp / "episodes.json", dict(arrays=arrays, upside_down=upside_down, phases=phases, episodes=records))
    os.replace(tmp, out)
    print(f"{out}: {len(records)} episodes, {start} frames, arrays {', '.join(arrays)}")

# ---------------------------------------------------------------- the toy world
BLOCKS = dict(red=(0.86, 0.16, 0.16), green=(0.13, 0.65, 0.24), blue=(0.16, 0.32, 0.90), yellow=(0.97, 0.82, 0.10))
TRAYS = dict(white=(0.97, 0.97, 0.97), black=(0.12, 0.12, 0.12))
BLOCK_HALF, TRAY_HALF, REACH = 0.07, 0.15, 0.09            # half sides; how far off its centre a block is still grasped (table width = 1)
MAX_STEP, TOY_LIMIT = 0.06, 120                            # table widths a frame at |action| = 1; steps of an evaluation
REGIONS = np.array([[0.2, 0.28], [0.5, 0.28], [0.8, 0.28], [0.5, 0.72], [0.2, 0.72], [0.8, 0.72]])     # of the four blocks and two trays
# a goal is (block, tray, block, tray), in this order: 48 of them, every fifth a task; the other 38 appear in hand video only
GOALS = [(a, s, b, t) for a, b in itertools.permutations(range(4), 2) for s in range(2) for t in range(2)]
TASKS = GOALS[::5]

def toy_text(goal):
    (a, b), (s, t) = (list(BLOCKS)[i] for i in goal[::2]), (list(TRAYS)[i] for i in goal[1::2])
    return f"put the {a} block on the {s} tray and the {b} block on the {t} tray"

class ToyWorld:
    """B tables seen from above, each with four blocks, two trays and a gripper. Positions lie in [0, 1]^2 (table widths, y downwards).
    Action (B, 3) in [-1, 1]: dx, dy, grip (> 0 closes, as in LIBERO). Fingers take three frames to close or open."""
    def __init__(self, look="robot", size=32):
        self.look, self.size = look, size
    def reset(self, goals, seeds):
        """goals: B goals; seeds: B seeds, each deciding a layout: every object near its region, as in LIBERO, and clear of the others."""
        n, tray = len(goals), np.arange(6) > 3                                 # objects: 4 blocks, then 2 trays
        self.goals, self.objects = np.array(goals), np.zeros((n, 6, 2))
        self.hand, self.opening, self.held = np.zeros((n, 2)), np.ones(n), np.full(n, -1)
        clear = 0.20 + 0.06 * (tray[:, None] | tray) - np.eye(6)
        for i, seed in enumerate(seeds):
            rng = np.random.default_rng(seed)
            while (np.abs(self.objects[i][:, None] - self.objects[i]).max(-1) < clear).any():
                self.objects[i] = REGIONS + rng.uniform(-0.12, 0.12, (6, 2))
            self.hand[i] = rng.uniform(0.1, 0.9, 2)
        return self
    def step(self, actions):
        """Advance one frame; returns success (B,) bool."""
        actions, rows, before = np.clip(actions, -1, 1), np.arange(len(self.held)), self.hand
        close = actions[:, 2] > 0
        self.hand = np.clip(before + actions[:, :2] * MAX_STEP, 0.02, 0.98)
        self.opening = np.clip(self.opening + np.where(close, -1, 1) / 3, 0, 1)
        off = np.abs(self.objects[:, :4] - self.hand[:, None]).max(-1)         # (B, 4)
        touch = close & (abs(self.opening - 1 / 3) < 0.1) & (self.held < 0) & (off.min(1) < REACH)
        self.held = np.where(touch, off.argmin(1), np.where(~close & (self.opening > 0.5), -1, self.held))
        carry = self.held >= 0
        self.objects[rows[carry], self.held[carry]] += (self.hand - before)[carry]
        return self.success()
    def success(self):
        """Both blocks lie on their trays and neither is held: (B,) bool."""
        rows, (a, s, b, t) = np.arange(len(self.held)), self.goals.T
        on = [np.abs(self.objects[rows, block] - self.objects[rows, 4 + tray]).max(-1) < TRAY_HALF for block, tray in ((a, s), (b, t))]
        return on[0] & on[1] & (self.held < 0)
    def proprio(self):                                                         # (B, 3): x, y, opening
        return np.concatenate([self.hand, self.opening[:, None]], 1).astype(np.float32)
    def frames(self, rows=slice(None)):                                        # (B, size, size, 3) uint8, of these tables only
        return toy_render(self.hand[rows], self.opening[rows], self.objects[rows], self.held[rows], self.look, self.size)

def toy_render(hand, opening, objects, held, look, size):
    """Anti-aliased frames (B, size, size, 3) uint8 of B states, painted back to front."""
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    image = np.empty((len(hand), 3, size, size), np.float32)
    image[:] = np.reshape((0.73, 0.75, 0.78), (3, 1, 1))
    def paint(mask, colour):                                                   # mask (B, size, size)
        image[:] += mask.astype(np.float32)[:, None] * (np.reshape(colour, (3, 1, 1)).astype(np.float32) - image)
    def box(x, y, w, h):
        cover = lambda at, half: np.clip(0.5 + (np.reshape(half, (-1, 1)) - abs(grid - at[:, None])) * size, 0, 1)     # (B, size)
        return cover(y, h)[:, :, None] * cover(x, w)[:, None, :]

    for i, colour in enumerate(TRAYS.values()):
        paint(box(*objects[:, 4 + i].T, TRAY_HALF, TRAY_HALF), colour)
    for top in (False, True):                                                  # the held block lies above the others
        for i, colour in enumerate(BLOCKS.values()):
            paint(box(*objects[:, i].T, BLOCK_HALF, BLOCK_HALF) * ((held == i) == top)[:, None, None], colour)
    (x, y), gap = hand.T, 0.10 + 0.08 * opening            # wide enough to be seen, frame by frame, at 32 x 32
    if look == "robot":                                                        # a palm plate and two fingers
        paint(box(x, y - 0.13, gap + 0.03, 0.04), (0.80, 0.15, 0.70))
    else:                                                                      # a sleeve from the table's edge, palm, thumb and finger
        paint(box(x, (y + 1.3) / 2, 0.05, (1.0 - y) / 2), (0.36, 0.45, 0.30))
        paint(box(x, y + 0.15, gap, 0.05), (0.96, 0.66, 0.50))
    for side in (-1, 1):
        paint(box(x + side * gap, y + (look == "hand") * 0.03, 0.03, 0.095), (0.45, 0.10, 0.42) if look == "robot" else (0.88, 0.55, 0.40))
    return (image.transpose(0, 2, 3, 1) * 255 + 0.5).astype(np.uint8)

def toy_demonstrate(look, goals, seed, size):
    """Scripted demonstrations, all at once; yields (index, arrays) of those that succeed. truth_* is for measuring.
    An episode has its own speed; the heading wanders smoothly (an Ornstein-Uhlenbeck angle); now and then the hand rests 2-4 frames."""
    n, rng, log = len(goals), np.random.default_rng([seed, len(goals)]), []
    world = ToyWorld(look, size).reset(goals, [[seed, i] for i in range(n)])
    speed = rng.uniform(*((0.65, 1.0) if look == "robot" else (0.5, 0.85)), (n, 1))
    home, left, alive = rng.uniform(0.2, 0.8, (n, 2)), rng.integers(3, 7, n), np.ones(n, bool)
    part, angle, rest, velocity, rows = np.zeros(n, int), np.zeros((n, 1)), np.zeros(n, int), np.zeros((n, 2)), np.arange(n)
    while alive.any() and len(log) < 200:
        phase, second = np.where(part == 8, 4, part % 4), np.minimum(part // 4, 1)             # part 0..8 counts through both goals
        block, tray = world.goals[rows, 2 * second], world.goals[rows, 2 * second + 1]
        slot = world.objects[rows, 4 + tray] + np.where(second, 1, -1)[:, None] * [0.07, 0.0]  # two blocks fit on one tray
        at = world.objects[rows, block]
        away = np.select([(phase == 4)[:, None], (phase == 2)[:, None]], [home - world.hand, slot - at], at - world.hand)
        distance, moving = np.linalg.norm(away, axis=1, keepdims=True) + 1e-9, (phase % 2 == 0)
        angle = 0.85 * angle + 0.12 * rng.standard_normal((n, 1))
        rest = np.where((rest == 0) & (rng.random(n) < 0.012) & moving, rng.integers(2, 5, n), np.maximum(rest - 1, 0))
        turn = angle * np.minimum(1, distance / 0.15)
        heading = (away * np.cos(turn) + away[:, ::-1] * [-1, 1] * np.sin(turn)) / distance
        pace = np.minimum(speed, 0.7 * distance / MAX_STEP) * (rest == 0)[:, None]
        velocity = moving[:, None] * (0.4 * velocity + 0.6 * pace * heading)
        actions = np.concatenate([velocity, np.where((phase == 1) | (phase == 2), 1.0, -1.0)[:, None]], 1)
        state, proprio = (world.hand, world.opening, world.objects.copy(), world.held), world.proprio()
        world.step(actions)
        log.append(state + (alive, proprio, actions.astype(np.float32), world.proprio() - proprio, phase.astype(np.int8)))
        still, shut = distance[:, 0] < 0.05, world.opening
        part = part + ((moving & still & (part < 8)) | (phase == 1) & (shut < 0.01) | (phase == 3) & (shut > 0.99))
        left, velocity = left - (phase == 4), velocity * ~(moving & still)[:, None]
        alive = alive & (left > 0)
    columns = [np.stack(column) for column in zip(*log)]                       # each (steps, n, ...)
    for i in np.flatnonzero(world.success() & ~alive):
        *state, _, proprio, actions, motion, phase = (c[columns[4][:, i], i] for c in columns)
        yield i, dict(frames=toy_render(*state, look, size), proprio=proprio, actions=actions, truth_phase=phase,
                      truth_motion=motion, truth_layout=state[2].reshape(-1, 12).astype(np.float32))

def pack_toy(out, hand=880, demos=55, size=32, seed=0):
    """Pack OUT/hand, action-free video of all 48 goals, and OUT/robot, demos a task with proprio and actions. One in eleven is held out."""
    others = [g for g in GOALS if g not in TASKS]
    for look, goals in (("hand", [(TASKS[i // 2 % 10] if i % 2 else others[i // 2 % 38]) for i in range(hand)]), ("robot", TASKS * demos)):
        if not Path(out, look).exists():
            pack(Path(out, look), ((toy_text(goals[i]), str(GOALS.index(goals[i])), "val" if i >= len(goals) * 10 // 11 else "train",
                                    arrays if look == "robot" else {k: v for k, v in arrays.items() if k not in ("proprio", "actions")})
                                   for i, arrays in toy_demonstrate(look, goals, 2 * seed + (look == "robot"), size)), len(goals))

# ---------------------------------------------------------------- importers
def resize(frames, size):
    """(T, H, W, 3) uint8 -> (T, size, size, 3), antialiased."""
    small = lambda frame: np.asarray(Image.fromarray(frame).resize((size, size), Image.LANCZOS))
    return frames if frames.shape[1:3] == (size, size) else np.stack([small(f) for f in frames])

def libero_episodes(files, size, demos, keep_actions, val):
    """Episodes of LIBERO's official HDF5. There obs[j] was seen AFTER actions[j]: the action to learn from obs[j] is actions[j + 1]."""
    import h5py
    for path in files:
        try:
            with h5py.File(path, "r") as file:
                data, task = file["data"], path.name.removesuffix("_demo.hdf5")
                text = "".join(json.loads(data.attrs["problem_info"])["language_instruction"]).strip('"')
                names = sorted((k for k in data if k.startswith("demo_")), key=lambda k: int(k[5:]))[:demos]        # demo_10 after demo_9
                phases = [p.split(":")[-1].split("_")[-1] for p in json.loads(data.attrs.get("phase_names", "[]"))]     # "2:knob_turn"
                for i, name in enumerate(names):
                    obs, actions = data[name]["obs"], data[name]["actions"][:].astype(np.float32)
                    proprio = np.concatenate([obs["joint_states"][:], obs["gripper_states"][:]], 1).astype(np.float32)
                    episode = dict(frames=obs["agentview_rgb"][:], wrist=obs["eye_in_hand_rgb"][:], truth_actions=actions)
                    episode |= dict(proprio=proprio, actions=actions) if keep_actions else {}
                    if phases:
                        episode["truth_phase"] = np.array([LIBERO_PHASES.index(phases[p]) for p in data[name]["phase"][:]], np.int8)
                    episode = {k: v[1:] if k.endswith("actions") else v[:-1] for k, v in episode.items()}
                    episode |= {k: resize(episode[k], size) for k in ("frames", "wrist")}
                    yield text, task, "val" if i >= len(names) - round(val * len(names)) else "train", episode
        except (OSError, KeyError, ValueError, TypeError) as error:
            fail(f"{path}: truncated, or not in LIBERO's format ({' '.join(str(error).split())[:120]})")

def read_labels(path):
    """{video name: caption} from JSON or CSV with columns id (or file) and label (or text): Something-Something's label files work."""
    try:
        raw = Path(path).read_text() if path else "[]"
        delimiter = ";" if ";" in raw.split("\n")[0] else ","
        rows = json.loads(raw) if not path or path.endswith(".json") else csv.DictReader(raw.splitlines(), delimiter=delimiter)
        return {Path(str(r.get("id", r.get("file")))).stem: str(r.get("label", r.get("text", ""))) for r in rows}
    except (OSError, ValueError, AttributeError) as error:
        fail(f"{path}: no label file with columns id and label ({type(error).__name__})")

def video_episodes(files, labels, size, stride, val):
    """Episodes of video files, or of folders of images; every stride-th frame."""
    import av
    for i, path in enumerate(files):
        try:
            if path.is_dir():
                names = sorted(f for f in path.iterdir() if f.suffix.lower() in (".jpg", ".jpeg", ".png"))
                frames = [np.asarray(Image.open(f).convert("RGB")) for f in names[::stride]]
            else:
                with av.open(str(path)) as video:
                    frames = [f.to_ndarray(format="rgb24") for j, f in enumerate(video.decode(video=0)) if j % stride == 0]
            frames = resize(np.stack(frames), size)
        except (OSError, ValueError, IndexError) as error:                     # PyAV's errors are OSErrors and ValueErrors
            fail(f"{path}: unreadable video ({' '.join(str(error).split())[:100]})")
        yield labels.get(path.stem, ""), path.stem, "val" if val and i % round(1 / val) == 0 else "train", dict(frames=frames)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("kind", choices=["toy", "libero", "video"], help="the built-in world, LIBERO's HDF5 files, or a folder of videos")
    add("--out", required=True, help="folder to write (toy: makes OUT/hand and OUT/robot)")
    add("--src", help="folder of .hdf5 files (libero), or of .webm/.mp4/.gif files or image folders (video)")
    add("--size", type=int, help="image side in pixels (default: toy 32, others 64)")
    add("--demos", type=int, help="demonstrations a task (default: toy 55, of which 5 are held out; libero all)")
    add("--videos", type=int, default=880, help="toy: number of hand videos (default: %(default)s)")
    add("--actions", choices=["keep", "none"], default="keep", help="libero: none packs action-free video (default: %(default)s)")
    add("--labels", help="video: captions, CSV or JSON (default: none)")
    add("--stride", type=int, default=1, help="video: keep every n-th frame (default: %(default)s)")
    add("--val", type=float, default=0.1, help="share of episodes held out for the figures (default: %(default)s)")
    add("--seed", type=int, default=0, help="toy: seed of layouts and motion (default: %(default)s)")
    args = parser.parse_args()
    if args.kind == "toy":
        if Path(args.out, "hand").exists() and Path(args.out, "robot").exists():
            fail(f"{args.out} is packed already: delete it or choose another --out")
        return pack_toy(args.out, args.videos, args.demos or 55, args.size or 32, args.seed)
    src, endings = Path(args.src or ""), (".hdf5",) if args.kind == "libero" else (".webm", ".mp4", ".gif")
    files = sorted(f for f in src.iterdir() if f.suffix.lower() in endings or args.kind == "video" and f.is_dir()) if src.is_dir() else None
    if not args.src or not files:
        fail(f"--src {args.src}: " + ("no such folder" if not args.src or files is None else f"no {', '.join(endings)} files there"))
    if args.kind == "libero":
        pack(args.out, libero_episodes(files, args.size or 64, args.demos, args.actions == "keep", args.val), None, True, LIBERO_PHASES)
    else:
        pack(args.out, video_episodes(files, read_labels(args.labels), args.size or 64, args.stride, args.val), len(files))

if __name__ == "__main__":
    main()
