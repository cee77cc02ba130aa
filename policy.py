"""
Stage 3, the hierarchical policy (HiLAM, arXiv 2603.05815, section 3.3).

    pretraining on action-free video, with the arrays of stages 1 and 2 as pseudo-labels:
        high level  pi_h(o_t, text)  -> zbar_t, the skill of frame t
        low level   pi_l(o_t, skill) -> z_t, z_{t+1}, ... latent actions; skill: what pi_h says,
                    in whole deviations, so that no text leaks through its small digits
    fine-tuning on a few labelled demonstrations: pi_h is frozen; pi_l, which hears no text, only
    the skill, gets a new head and learns real actions

Both have BAKU's architecture (NeurIPS 2024), smaller: an image encoder with FiLM by text or skill,
a token each for text or skill, cameras, proprio and ACTION, a causal transformer read at ACTION,
actions in chunks. The flat baseline is pi_l alone, told the text.

    python policy.py                    # toy world: HiLAM, 5 demonstrations a task, 4 minutes
    python policy.py --variant flat     # the same network without hierarchy and pretraining
    python policy.py --variant flat_z0  # pretrained on the same video, but without hierarchy

Writes to OUT: policy_NAME_DEMOS.pt .json .png (actions of a held-out demonstration) and a log with
its curve; policy_pretrain_... and its log; NAME is the variant with lowtext and --tasks.
"""

import functools
import math
import re
import time
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from natsort import natsorted
from torch import nn
from tqdm import tqdm

import data
from data import COUNT, REAL, WIDTH, fail, number, write
from lam import ConvBlock, read_images, to_images, warp
from skills import load_rows, stack

# The rows of the paper's Table 1, and flat: the arrays in OUT that (pi_h, pi_l) learn from video.
# None for pi_h: there is no pi_h; for pi_l: no pretraining, all learn from demonstrations alone
VARIANTS = {
    "hilam": ("skills1", "latents"),
    "hilam_z2": ("skills2", "latents"),
    "hilam_z2_z1": ("skills2", "skills1"),
    "hilam_scratch": ("skills1", None),
    "flat": (None, None),
    "flat_z0": (None, "latents"),
    "flat_z2": (None, "skills2"),
}
WORDS = 4096  # buckets that words are hashed into
LONGEST = 32  # words of a sentence that are read


def amount(text):
    """'5' -> 5, a count; '0.1' -> 0.1, a share."""
    return number(float, 1e-6, 1)(text) if "." in text else number(int, 1)(text)


def get_args():
    parser = data.make_parser(__doc__, steps=1500)
    add = parser.add_argument_group("experiment").add_argument
    add("--variant", choices=VARIANTS, default="hilam", help="flat, or a row of Table 1")
    add("--demos", type=amount, default=0.1, help="labelled demonstrations a task: 5, or share 0.1")
    add("--tasks", type=number(int, 0), nargs="+", help="labelled tasks, numbered by their names")
    add("--pretrain-steps", type=COUNT, default=2500, help="besides --steps of fine-tuning")
    add("--low-text", action="store_true", help="tell pi_l the text too, its FiLM is by the text")
    add = parser.add_argument_group("model and training").add_argument
    add("--chunk", type=COUNT, default=10, help="actions predicted at once; BAKU: 10")
    add("--patch", type=COUNT, default=4, help="pixels a patch; size / patch is 8, 16, 32 or 64")
    add("--channels", type=WIDTH, default=32, help="channels at first, then twice as many")
    add("--width", type=WIDTH, default=128, help="of a token; BAKU: 256")
    add("--layers", type=number(int, 0), default=2, help="blocks; BAKU: 8; 0: an MLP of all tokens")
    add("--warp", type=REAL, default=0.0, help="random affine maps of the images; LIBERO: 0.15")
    add("--batch", type=COUNT, default=64, help="frames a step and process, equally of each set")
    add("--lr", type=number(float, 1e-9), default=7e-4, help="peak rate where all weights are new")
    add("--finetune-lr", type=number(float, 1e-9), default=3e-4, help="peak rate after pretraining")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe: for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs")
    args = parser.parse_args()
    args.tasks = sorted(set(args.tasks or []))
    return args


# ----------------------------------------------------------------------------------------- models
@functools.cache
def tokenize(text):
    """A sentence's words, and its words with their places, hashed: (64,) int64, 0 is padding."""
    keys, words = [], re.findall(r"\w+", text.lower())
    if len(words) > LONGEST:
        print(f"only the first {LONGEST} words are read of: {text}")
    for place, word in enumerate(words[:LONGEST]):
        keys += [word, f"{place} {word}"]
    buckets = [1 + zlib.crc32(key.encode()) % WORDS for key in keys]
    return torch.tensor(buckets + [0] * (2 * LONGEST - len(buckets)))


def token(inside, width):
    """A network from a vector (B, inside) to a token (B, width)."""
    layers = [nn.Linear(inside, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.LayerNorm(width))


class ImageEncoder(nn.Module):
    """Images (B, 3, S, S), condition (B, width) -> (B, width); the condition acts by FiLM."""

    def __init__(self, size, patch, channels, width):
        super().__init__()
        self.patch = patch
        self.grid = size // patch
        if size % patch or self.grid not in (8, 16, 32, 64):
            fail(f"--patch {patch}: {size} pixels make no grid of 8, 16, 32, 64: try {size // 16}")
        widths = [3 * patch**2 + 2, channels, 2 * channels, 2 * channels]
        self.conv = nn.ModuleList()
        for i in range(3):
            stride = 2 if self.grid > 8 * 2**i else 1  # the last map is 8 x 8
            self.conv.append(ConvBlock(widths[i], widths[i + 1], stride, width))
        self.fine = ConvBlock(2 * channels, 16, 1, width)  # fine differences of place
        self.look = nn.Linear(10 * channels + 16 * 64, 2 * width)
        self.select = nn.Linear(width, 4 * width)
        self.out = nn.Linear(2 * width, width)

    def forward(self, images, condition):
        x = F.pixel_unshuffle(images - 0.5, self.patch)
        line = torch.linspace(-1, 1, self.grid, device=x.device)
        across = line.expand(len(x), 1, self.grid, self.grid)
        x = torch.cat([x, across, across.transpose(2, 3)], dim=1)  # and where each patch is
        seen = []
        for block in self.conv:
            x = block(x, condition)
            # spatial softmax: the place where each channel looks (Levine et al. 2016)
            attention = (4 * x.flatten(2)).softmax(-1).view_as(x)
            line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
            seen += [attention.sum(2) @ line, attention.sum(3) @ line]
        seen = torch.cat([*seen, self.fine(x, condition).flatten(1)], dim=1)
        scale, shift = self.select(condition).chunk(2, dim=1)  # FiLM: which of it matters
        return self.out(F.silu(self.look(seen) * (1 + scale) + shift))


class Policy(nn.Module):
    """Images (B, cameras, 3, S, S), a sentence's tokens, skill (B, skill), proprio (B, P) ->
    (B, outside). One with a skill hears no text unless --low-text says so."""

    def __init__(self, shape, settings, cameras, skill, outside):
        super().__init__()
        width = settings["width"]
        text = settings["low_text"] or not skill
        self.cameras = cameras
        tokens = cameras + 2 + text + (skill > 0)  # 2: proprio and ACTION
        self.text = None
        if text:  # the sum of its words' embeddings
            words = nn.EmbeddingBag(WORDS + 1, width, mode="sum", padding_idx=0)
            self.text = nn.Sequential(words, nn.LayerNorm(width), token(width, width))
        self.skill = token(skill, width) if skill else None
        self.image = ImageEncoder(shape["size"], settings["patch"], settings["channels"], width)
        layers = [nn.Linear(shape["proprio"], width), nn.SiLU(), nn.Linear(width, width)]
        self.proprio = nn.Sequential(*layers)
        self.no_proprio = nn.Parameter(torch.zeros(width))  # video has none
        self.no_camera = nn.Parameter(torch.zeros(width))  # people's video has one camera
        self.action = nn.Parameter(0.02 * torch.randn(width))
        self.kind = nn.Parameter(0.02 * torch.randn(tokens, width))  # tells the tokens apart
        if settings["layers"]:
            self.mix = nn.Sequential(stack(settings["layers"], width), nn.RMSNorm(width))
        else:
            layers = [nn.Flatten(), nn.Linear(tokens * width, 4 * width), nn.SiLU()]
            self.mix = nn.Sequential(*layers, nn.Linear(4 * width, width), nn.SiLU())
        self.head = nn.Linear(width, outside)

    def forward(self, images, sentence, skill=None, proprio=None):
        images = images[:, : self.cameras]
        b, cameras = images.shape[:2]
        told = [] if self.text is None else [self.text(sentence)]
        if self.skill is not None:
            told.append(self.skill(skill))
        steering, *others = told  # FiLM for all cameras by the text if it is heard, else the skill
        condition = steering.repeat_interleave(cameras, 0)
        seen = self.image(images.flatten(0, 1), condition).view(b, cameras, -1)
        missing = self.no_camera.expand(b, self.cameras - cameras, -1)
        body = self.no_proprio.expand(b, -1) if proprio is None else self.proprio(proprio)
        last = torch.stack([body, *others, self.action.expand(b, -1)], dim=1)
        tokens = torch.cat([steering[:, None], seen, missing, last], dim=1)
        mixed = self.mix(tokens + self.kind).view(b, -1, tokens.shape[-1])
        return self.head(mixed[:, -1])  # read at ACTION; an MLP gives one vector


class Agent(nn.Module):
    """Both levels, or a flat policy. shape, a dict: widths of proprio, target and skill (0: flat);
    size of images; cameras that pi_l sees; high_cameras that pi_h sees: those of all video."""

    def __init__(self, shape, settings):
        super().__init__()
        self.shape = shape
        self.settings = settings
        skill, outside = shape["skill"], settings["chunk"] * shape["target"]
        self.high = Policy(shape, settings, shape["high_cameras"], 0, skill) if skill else None
        self.low = Policy(shape, settings, shape["cameras"], skill, outside)
        for name in ("proprio", "target", "skill"):
            self.set_scale(name, np.zeros(shape[name]), np.ones(shape[name]))

    def set_scale(self, name, mean, scale):
        """The networks see a proprio, target or skill x as (x - mean) / scale, (D,) each."""
        self.register_buffer(f"{name}_mean", torch.from_numpy(mean).float())
        self.register_buffer(f"{name}_scale", torch.from_numpy(scale).float())

    def predict_skill(self, images, tokens):
        """pi_h(o_t, text): the standardised skill zbar (B, D) of these images; None when flat."""
        return self.high(images, tokens) if self.high else None

    def predict(self, images, tokens, skill, proprio=None):
        """pi_l(o_t, skill): a chunk of normalised actions or latents, (B, chunk, target)."""
        if skill is not None:  # in whole deviations (docs/experiments.md, 1)
            skill = skill + (skill.round() - skill).detach()  # straight-through
        if proprio is not None:
            proprio = (proprio - self.proprio_mean) / self.proprio_scale
        return self.low(images, tokens, skill, proprio).view(len(images), -1, self.shape["target"])

    def forward(self, images, tokens, target, mask, proprio=None, skill=None):
        """The l1 losses of a batch, a dict. target (B, chunk, D) counts where mask (B, chunk) is
        True; proprio is given in fine-tuning only, the true skill (B, D) in pretraining only."""
        losses = {}
        target = (target - self.target_mean) / self.target_scale
        predicted = self.predict_skill(images, tokens)
        if skill is not None:
            skill = (skill - self.skill_mean) / self.skill_scale
            losses["skill"] = (predicted - skill).abs().mean()
            predicted = predicted.detach()  # each level learns from its own labels
        error = (self.predict(images, tokens, predicted, proprio) - target).abs().mean(-1)
        losses["action"] = (error * mask).mean()  # places past the end count as 0
        return losses

    @torch.no_grad()
    def act(self, frames, wrist, proprio, texts, skill=None):
        """Arrays of frames and wrist (B, S, S, 3) uint8 or None, proprio (B, P), B sentences, and
        perhaps a skill (B, D) in place of pi_h's -> actions (B, chunk, A). Other images raise."""
        device, side = self.target_mean.device, self.shape["size"]
        views = [frames, wrist][: self.shape["cameras"]]
        if any(np.shape(x)[1:] != (side, side, 3) or x.dtype != np.uint8 for x in views):
            raise ValueError(f"{len(views)} cameras, uint8 (B, {side}, {side}, 3) each")
        images = to_images(views, device)
        tokens = torch.stack([tokenize(text) for text in texts]).to(device)
        proprio = torch.from_numpy(proprio).float().to(device)
        if skill is None:
            skill = self.predict_skill(images, tokens)
        else:
            skill = (torch.from_numpy(skill).to(device) - self.skill_mean) / self.skill_scale
        actions = self.predict(images, tokens, skill, proprio).clamp(-1, 1)
        return (actions * self.target_scale + self.target_mean).cpu().numpy()


# ------------------------------------------------------------------------------------------- data
# What to learn from a packed set. rows: to draw from; gap: how many last frames of an episode have
# no target; cameras: how many are seen; arrays {name: (T, D)}: target, whose rows t, t+1, ... are a
# chunk, and skill or proprio, whose row t is read
Labels = namedtuple("Labels", "dataset rows gap cameras arrays")


def get_batch(labels, count, chunk, rng, device):
    """Agent.forward's arguments for count random rows, as many of each set."""
    parts = []
    for dataset, rows, gap, cameras, arrays in labels:
        t = rng.choice(rows, max(1, count // len(labels)))
        after = t[:, None] + np.arange(chunk)  # (B, chunk)
        episodes = np.searchsorted(dataset.start, t, side="right") - 1
        part = {"images": read_images(dataset, t, cameras, "cpu")}
        part["tokens"] = torch.stack([tokenize(dataset.episodes[e]["text"]) for e in episodes])
        part["mask"] = torch.from_numpy(after <= dataset.last[t][:, None] - gap)
        for name, array in arrays.items():
            at = np.minimum(after, dataset.total - 1) if name == "target" else t
            part[name] = torch.from_numpy(array[at])
        parts.append(part)
    return {key: torch.cat([part[key] for part in parts]).to(device) for key in parts[0]}


def augment(images, amount):
    """Images (B, cameras, 3, S, S) under random affine maps, of random contrast and brightness."""
    if amount:
        flat = images.flatten(0, 1)  # (B cameras, 3, S, S)
        images = warp([flat], amount)[0].view_as(images)
    gain, offset = torch.rand(2, len(images), 1, 1, 1, 1, device=images.device)
    return ((images - 0.5) * (0.8 + 0.4 * gain) + (0.4 + 0.2 * offset)).clamp(0, 1)


def labelled_episodes(dataset, demos, tasks):
    """The first demos training episodes (float: that share) of the tasks with these numbers."""
    train = dataset.split("train")
    of = np.array([dataset.episodes[e]["task"] for e in train])
    names = natsorted(set(of))
    if tasks and max(tasks) >= len(names):
        fail(f"--tasks {max(tasks)}: there are {len(names)} tasks, numbered from 0")
    if tasks:
        print(f"labelled: {', '.join(names[i] for i in tasks)}")
    chosen = []
    for i in tasks or range(len(names)):
        episodes = train[of == names[i]]
        count = max(1, round(demos * len(episodes))) if isinstance(demos, float) else demos
        if count > len(episodes):
            fail(f"--demos {demos}: task {names[i]} has {len(episodes)} to train on")
        chosen.append(episodes[:count])
    print(f"fine-tuning on {sum(map(len, chosen))} demonstrations of {dataset.name}")
    return np.sort(np.concatenate(chosen))


def join(labels, name):
    """The rows to learn from of an array, of all sets, (N, D)."""
    return np.concatenate([part.arrays[name][part.rows] for part in labels])


def prepare_pretraining(args, sets, shape):
    """A new agent of shape, and the video with its pseudo-labels."""
    skill, action = VARIANTS[args.variant]
    gap = data.load_checkpoint(Path(args.out, "lam.pt"), "lam")["settings"]["gap"]
    cameras = min(shape["cameras"], 1 + all(d.wrist is not None for d in sets))
    labels = []
    for d in sets:
        names = {"target": action, "skill": skill}
        arrays = {key: load_rows(d, args.out, name) for key, name in names.items() if name}
        labels.append(Labels(d, d.rows(d.split("train"), gap), gap, cameras, arrays))
    known = {name: join(labels, name) for name in labels[0].arrays}
    widths = {name: array.shape[1] for name, array in known.items()}
    agent = Agent(shape | widths | {"high_cameras": cameras}, vars(args))
    for name, array in known.items():
        agent.set_scale(name, array.mean(0), array.std(0) + 1e-6)
    return agent, labels


def prepare_finetuning(args, sets, episodes, shape, agent):
    """The pretrained agent, or a new one, made ready for real actions, and the demonstrations."""
    labels = []
    for d, chosen in zip(sets, episodes, strict=True):
        arrays = {"target": d.actions, "proprio": d.proprio}
        labels.append(Labels(d, d.rows(chosen), 0, shape["cameras"], arrays))
    actions, proprio = join(labels, "target"), join(labels, "proprio")
    if agent is None:
        agent = Agent(shape | {"target": actions.shape[1]}, vars(args))
    else:
        agent.shape["target"] = actions.shape[1]
        agent.low.head = nn.Linear(args.width, args.chunk * actions.shape[1])  # a new one
        if agent.high:
            agent.high.requires_grad_(False)  # pi_h is frozen
    agent.set_scale("proprio", proprio.mean(0), proprio.std(0) + 1e-3)
    low, high = actions.min(0), actions.max(0)  # become -1 and 1
    agent.set_scale("target", (low + high) / 2, np.maximum((high - low) / 2, 1e-3))
    return agent, labels


def load_agent(out, name, demos, device):
    """The fine-tuned policy NAME of a run folder, ready to act."""
    path = Path(out, f"policy_{name}_{demos}.pt")
    record = data.load_checkpoint(path, "policy_finetune")
    agent = Agent(record["shape"], record["settings"])
    data.load_weights(agent, record, path)
    return agent.to(device)


# ----------------------------------------------------------------------------------------- report
def report(args, name, agent, dataset):
    """Measure the first action's l1 error on held-out demonstrations, and draw one of them."""
    found = []
    episodes = dataset.split("val")[:20]
    for e in episodes:
        rows = dataset.rows([e])
        wrist = None if dataset.wrist is None else dataset.wrist[rows]
        texts = [dataset.episodes[e]["text"]] * len(rows)
        found.append(agent.act(dataset.frames[rows], wrist, dataset.proprio[rows], texts)[:, 0])
    true, actions = dataset.actions[dataset.rows(episodes)], np.concatenate(found)
    mean_error = max(np.abs(true - true.mean(0)).mean(), 1e-3)  # 0 where the robot rests
    error = float(np.abs(actions - true).mean() / mean_error)
    print(f"held-out {dataset.name}: l1 error of the action over predicting the mean {error:.2f}")
    write(Path(args.out, f"{name}.json"), {"action_error": round(error, 4)})
    figure = Figure((9, 1.4 * true.shape[1]), layout="constrained")
    axes = figure.subplots(true.shape[1], sharex=True, squeeze=False)[:, 0]
    for d, axis in enumerate(axes):
        axis.plot(true[: len(found[0]), d], "k", label="demonstration")
        axis.plot(found[0][:, d], "tab:orange", label=args.variant)
        axis.set_ylabel(f"action {d}")
    axis.set_xlabel("frame of a held-out demonstration")
    axis.legend(loc="upper right")
    write(Path(args.out, f"{name}.png"), figure)


def run_name(args, stage):
    """The name of a training's files. Several fine-tunings share a pretraining."""
    parts = ["lowtext"] if args.low_text else []
    if stage == "policy_pretrain":
        return "_".join([stage, *filter(None, VARIANTS[args.variant]), *parts])
    if args.tasks:
        parts.append("tasks" + "-".join(map(str, args.tasks)))
    return "_".join(["policy", args.variant, *parts, str(args.demos)])


def main():
    args = get_args()
    device, rank, world = data.start(args.device)
    sets = data.open_sets(args.data)
    labelled = [d for d in sets if d.actions is not None]
    if not labelled or any(d.proprio is None for d in labelled):
        fail("fine-tuning needs a packed set with actions, and proprio beside them")
    episodes = [labelled_episodes(d, args.demos, args.tasks) for d in labelled]
    skill, action = VARIANTS[args.variant]
    shape = {"size": sets[0].frames.shape[1], "proprio": labelled[0].proprio.shape[1]}
    shape["cameras"] = shape["high_cameras"] = 1 + all(d.wrist is not None for d in labelled)
    shape["skill"] = 64 if skill else 0  # 64: of hilam_scratch; pretraining sets the skills' own
    texts = [zlib.crc32(str(d.episodes).encode()) for d in sets]
    made_from = {"data": [d.checksum("proprio", "actions") for d in sets] + texts}
    if skill and action:
        made_from["skills"] = data.file_checksum(Path(args.out, "skills.pt"))
    agent = None
    for stage in ["policy_pretrain", "policy_finetune"] if action else ["policy_finetune"]:
        torch.manual_seed(args.seed)
        name = run_name(args, stage)
        settings = vars(args) | made_from | {"world": world}
        if stage == "policy_pretrain":
            steps, peak = args.pretrain_steps, args.lr
            agent, labels = prepare_pretraining(args, sets, shape)
            for key in ("variant", "demos", "tasks", "steps", "finetune_lr"):
                del settings[key]  # they do not matter to pretraining
        else:
            steps, peak = args.steps, (args.finetune_lr if agent else args.lr)
            agent, labels = prepare_finetuning(args, labelled, episodes, shape, agent)
        sample = get_batch(labels, 256, args.chunk, np.random.default_rng(0), device)
        fingerprint = [*sample.values(), *agent.state_dict().values()]  # the pretrained weights too
        settings["labels_and_weights"] = data.checksum(*[x.cpu().numpy() for x in fingerprint])
        agent.to(device)
        learning = [p for p in agent.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=peak, weight_decay=1e-3, fused=True)
        path = Path(args.out, f"{name}.pt")
        first, log = data.resume(path, stage, settings, agent, optimizer, f"{name}.json")
        if args.compile:
            agent.compile()
        wrapped = agent
        if world > 1:  # video has no proprio, so not all weights take part in every step
            wrapped = nn.parallel.DistributedDataParallel(agent, find_unused_parameters=True)
        seen, begin = [], time.time()
        for step in tqdm(range(first, steps), name, disable=rank > 0 or None):
            rng = np.random.default_rng([args.seed, step])  # the batch, the same in a resumed run
            torch.manual_seed(args.seed * 1_000_003 + step)  # and how its images are augmented
            cosine = 0.525 + 0.475 * math.cos(math.pi * step / steps)  # from 1 to a twentieth
            for group in optimizer.param_groups:
                group["lr"] = peak * cosine * min(1, (step + 1) / 100)  # after a warm-up
            batch = get_batch(labels, args.batch * world, args.chunk, rng, device)
            batch["images"] = augment(batch["images"], args.warp)
            batch = {key: x[rank::world] for key, x in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, args.bf16):
                losses = wrapped(**batch)  # pretraining: of skill and latents; then: of actions
            optimizer.zero_grad()
            sum(losses.values()).backward()
            norm = nn.utils.clip_grad_norm_(learning, 1.0)
            data.stop_unless_finite(norm, step, path)
            optimizer.step()
            seen.append({"step": step + 1} | {key: loss.item() for key, loss in losses.items()})
            if rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == steps):
                data.add_to_log(Path(args.out, name), log, seen, first, begin)
                record = {"stage": stage, "settings": settings, "shape": agent.shape}
                record |= {"step": step + 1, "steps": steps, "log": log}
                record |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
                write(path, record)
                seen = []
    if rank == 0:
        report(args, name, agent, labelled[0])


if __name__ == "__main__":
    main()
