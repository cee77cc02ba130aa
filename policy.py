"""
Stage 3, the hierarchical policy: from an image and a sentence to a skill, from an image and the
skill to actions (HiLAM, arXiv 2603.05815, section 3.3).

    pretrain on action-free video, with the pseudo-labels of stages 1 and 2:
        high level  pi_h(o_t, text)  -> zbar_t, the skill of frame t
        low level   pi_l(o_t, skill) -> z_t, z_{t+1}, ... latent actions, told pi_h's skill
    fine-tune on a few labelled demonstrations: pi_h is FROZEN, so the text reaches the actions
    through the skill alone; pi_l gets a new head and learns real actions

Both have BAKU's architecture (NeurIPS 2024), smaller: an image encoder with FiLM by the text (pi_h)
or the skill (pi_l), a token each for text or skill, cameras, proprio and ACTION, a causal
transformer read at ACTION, actions in chunks. The flat baseline is pi_l alone, told the text.

    python policy.py                       # toy world: HiLAM with 5 demonstrations a task, 3 minutes
    python policy.py --variant flat        # the same network without hierarchy and pretraining
    python policy.py --variant flat_z0     # pretrained on the same video, but without hierarchy

Writes to OUT: policy_NAME_DEMOS.pt .json .png (actions of a held-out demonstration) and a log with
its curve, the same of policy_pretrain_...; NAME is the variant with --video, --control, --tasks.
"""

import functools
import math
import random
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from tqdm import tqdm

import data
from data import COUNT, REAL, fail, natural, number, write
from lam import ConvBlock, warp
from skills import load_latents, stack

# variant: (stage of the skills that pi_h predicts, stage of the vectors that pi_l is pretrained on;
# 0 is the latent action); None: not there. The rows of the paper's Table 1.
VARIANTS = {
    "hilam": (1, 0),
    "hilam_z2": (2, 0),
    "hilam_z2_z1": (2, 1),
    "hilam_scratch": (1, None),
    "flat": (None, None),
    "flat_z0": (None, 0),
    "flat_z2": (None, 2),
}
WORDS = 4096  # buckets that words are hashed into
LONGEST = 32  # words of a sentence that are read


def amount(text):
    """'5' -> 5, a count; '0.1' -> 0.1, a share."""
    return number(float, 1e-6, 1)(text) if "." in text else number(int, 1)(text)


def get_args():
    parser = data.make_parser(__doc__, steps=1500)
    add = parser.add_argument_group("experiment").add_argument
    add("--variant", choices=VARIANTS, default="hilam", help="a row of the paper's Table 1")
    add("--demos", type=amount, default=0.1, help="labelled demonstrations a task: 5, or share 0.1")
    add("--tasks", type=number(int, 0), nargs="+", help="numbers of the labelled tasks, if not all")
    add("--pretrain-steps", type=COUNT, default=2500, help="--steps counts fine-tuning")
    add("--video", nargs="+", help="names of the sets to pretrain on, if not all of --data")
    text = "spoil the skills: of other segments, all zero, or of a uniform cut"
    add("--control", choices=["shuffled", "constant", "uniform"], help=text)
    add("--low-text", action="store_true", help="tell pi_l the text as well as the skill")
    add = parser.add_argument_group("model and training").add_argument
    add("--text", metavar="T5", help="a frozen T5 reads the text: t5-small, or its folder")
    add("--chunk", type=COUNT, default=10, help="actions predicted at once; BAKU: 10")
    add(
        "--patch", type=COUNT, default=4, help="side of an image patch; size / patch: 8, 16, 32, 64"
    )
    add("--channels", type=number(int, 8), default=16, help="channels at first, then twice as many")
    add("--width", type=number(int, 8), default=128, help="of a token; BAKU: 256")
    add(
        "--layers",
        type=number(int, 0),
        default=2,
        help="blocks; BAKU: 8; 0: an MLP over all tokens",
    )
    add("--warp", type=REAL, default=0.0, help="random affine maps of the images; LIBERO: 0.15")
    add("--batch", type=COUNT, default=64, help="frames a step and process, equally of each set")
    add("--lr", type=number(float, 1e-9), default=1.5e-3, help="peak, for new weights, of AdamW")
    text = "the same where pretrained weights are fine-tuned"
    add("--finetune-lr", type=number(float, 1e-9), default=3e-4, help=text)
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe: for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------- text
@functools.cache
def load_t5(name):
    """Tokenizer and encoder of a T5 by its name on the Hugging Face hub, or its folder; frozen."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel

        encoder = T5EncoderModel.from_pretrained(name).float().eval()
        return AutoTokenizer.from_pretrained(name), encoder
    except Exception as error:
        reason = " ".join(str(error).split())[:150]
        fail(
            f"--text {name}: {reason} (needs `pip install transformers` and a T5's name or folder)"
        )


@functools.cache
def tokenize(text, t5=None):
    """A sentence for the policy: its words, and its words with their places, hashed into buckets,
    (64,) int64, 0 is padding; or with a T5 the mean of its states, (D,) float32."""
    if t5:
        tokenizer, encoder = load_t5(t5)
        states = encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state
        return states[0].mean(0).detach()
    keys = []
    for place, word in enumerate(text.lower().split()[:LONGEST]):
        keys += [word, f"{place} {word}"]
    buckets = [1 + zlib.crc32(key.encode()) % WORDS for key in keys]
    return torch.tensor(buckets + [0] * (2 * LONGEST - len(buckets)))


def text_encoder(width, t5=None):
    """Tokens of a sentence -> (B, width): the sum of its words' embeddings, or T5's projected."""
    if t5:
        words = nn.Linear(load_t5(t5)[1].config.d_model, width)
    else:
        words = nn.EmbeddingBag(WORDS + 1, width, mode="sum", padding_idx=0)
    return nn.Sequential(words, nn.LayerNorm(width))


# ----------------------------------------------------------------------------------------- models
def token(inside, width):
    """A vector (B, inside) -> a token (B, width)."""
    layers = [nn.Linear(inside, width), nn.LayerNorm(width), nn.SiLU()]
    return nn.Sequential(*layers, nn.Linear(width, width), nn.LayerNorm(width))


def spatial_softmax(x):
    """Where each channel of x (B, C, H, H) looks: (B, 2 C) in [-1, 1] (Levine et al. 2016)."""
    line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
    attention = (4 * x.flatten(2)).softmax(-1).view_as(x)
    return torch.cat([attention.sum(2) @ line, attention.sum(3) @ line], dim=1)


class ImageEncoder(nn.Module):
    """(B, 3, S, S), condition (B, width) -> (B, width): convolutions with FiLM by the condition,
    read by a spatial softmax of every layer and by a small feature map kept whole."""

    def __init__(self, size, patch, channels, width):
        super().__init__()
        self.patch = patch
        self.grid = size // patch
        halvings = int(math.log2(self.grid / 8))
        if size % patch or self.grid != 8 * 2**halvings or halvings > 3:
            fail(
                f"--patch {patch}: frames of {size} pixels make no grid of 8, 16, 32 or 64 patches"
            )
        widths = [3 * patch**2 + 2, channels, 2 * channels, 2 * channels]
        self.conv = nn.ModuleList()
        for i in range(3):
            stride = 2 if i < halvings else 1
            self.conv.append(ConvBlock(widths[i], widths[i + 1], stride, width))
        self.fine = ConvBlock(
            2 * channels, 16, 1, width
        )  # (B, 16, 8, 8): fine differences of place
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
            seen.append(spatial_softmax(x))
        seen = torch.cat([*seen, self.fine(x, condition).flatten(1)], dim=1)
        scale, shift = self.select(condition).chunk(2, dim=1)  # FiLM: which of it matters
        return self.out(F.silu(self.look(seen) * (1 + scale) + shift))


class Policy(nn.Module):
    """One level, pi_h or pi_l: images (B, cameras, 3, S, S), text (B, W) and skill (B, D), either may
    be None, proprio (B, P) or None -> a chunk of vectors, (B, chunk, outside).

    shape: size, cameras, proprio of the data; text, skill: widths of what it is told, 0: untold.
    """

    def __init__(self, shape, text, skill, chunk, outside, settings):
        super().__init__()
        width = settings["width"]
        self.chunk = chunk
        self.cameras = shape["cameras"]
        tokens = self.cameras + 2 + (text > 0) + (skill > 0)
        self.text = token(text, width) if text else None
        self.skill = token(skill, width) if skill else None
        self.image = ImageEncoder(shape["size"], settings["patch"], settings["channels"], width)
        layers = [nn.Linear(shape["proprio"], width), nn.SiLU(), nn.Linear(width, width)]
        self.proprio = nn.Sequential(*layers)
        self.no_proprio = nn.Parameter(torch.zeros(width))  # video has none
        self.no_camera = nn.Parameter(torch.zeros(width))  # people's video has one camera
        self.action = nn.Parameter(0.02 * torch.randn(width))
        self.kind = nn.Parameter(0.02 * torch.randn(tokens, width))
        if settings["layers"]:
            self.mix = nn.Sequential(stack(settings["layers"], width), nn.RMSNorm(width))
        else:
            layers = [nn.Flatten(), nn.Linear(tokens * width, 4 * width), nn.SiLU()]
            layers += [nn.Linear(4 * width, width), nn.SiLU(), nn.Unflatten(1, (1, width))]
            self.mix = nn.Sequential(*layers)
        self.head = nn.Linear(width, chunk * outside)

    def forward(self, images, text=None, skill=None, proprio=None):
        b, cameras = images.shape[:2]
        told = []
        if self.text is not None:
            told.append(self.text(text))
        if self.skill is not None:
            told.append(self.skill(skill))
        condition = told[0].repeat_interleave(cameras, 0)  # one encoder for all cameras, as in BAKU
        seen = self.image(images.flatten(0, 1), condition).view(b, cameras, -1)
        missing = self.no_camera.expand(b, self.cameras - cameras, -1)
        body = self.no_proprio.expand(b, -1) if proprio is None else self.proprio(proprio)
        last = torch.stack([body, *told[1:], self.action.expand(b, -1)], dim=1)
        tokens = torch.cat([told[0][:, None], seen, missing, last], dim=1)
        mixed = self.mix(tokens + self.kind)[:, -1]  # read at ACTION
        return self.head(mixed).view(b, self.chunk, -1)


def l1(prediction, target, mask):
    """Mean absolute error over (B, chunk, D); what lies past an episode's end, mask (B, chunk)
    False, counts as no error."""
    return ((prediction - target).abs().mean(-1) * mask).mean()


class Agent(nn.Module):
    """Both levels, or a flat policy, with the means and scales that normalise what goes in and out.

    shape: dict of size, cameras, high_cameras, proprio, skill (0: flat) and target, the last three
    widths. settings: the flags of the run, a dict.
    """

    def __init__(self, shape, settings):
        super().__init__()
        self.shape = shape
        self.t5 = settings["text"]
        width, skill, chunk = settings["width"], shape["skill"], settings["chunk"]
        self.high = None
        if skill:  # pi_h(o, text) -> skill
            self.high_text = text_encoder(width, self.t5)
            seen = shape | {"cameras": shape["high_cameras"]}
            self.high = Policy(seen, width, 0, 1, skill, settings)
        self.low_text = None
        if settings["low_text"] or not skill:  # a flat policy is told the text
            self.low_text = text_encoder(width, self.t5)
        told = width if self.low_text else 0
        self.low = Policy(shape, told, skill, chunk, shape["target"], settings)
        for name in ("proprio", "skill", "target"):
            self.register_buffer(f"{name}_mean", torch.zeros(shape[name]))
            self.register_buffer(f"{name}_scale", torch.ones(shape[name]))

    def predict_skill(self, images, tokens):
        """pi_h: the standardised skill (B, D) for these images and sentences; None when flat."""
        if self.high is None:
            return None
        images = images[:, : self.shape["high_cameras"]]
        return self.high(images, self.high_text(tokens))[:, 0]

    def predict(self, images, tokens, proprio, skill):
        """pi_l: a chunk of normalised targets, (B, chunk, target)."""
        text = self.low_text(tokens) if self.low_text else None
        if proprio is not None:
            proprio = (proprio - self.proprio_mean) / self.proprio_scale
        return self.low(images, text, skill, proprio)

    def forward(self, images, tokens, proprio, target, mask, true_skill=None):
        """The losses of a batch, a dict. With true_skill, in pretraining, pi_h learns from it."""
        losses = {}
        skill = self.predict_skill(images, tokens)
        if true_skill is not None:
            losses["skill"] = (skill - true_skill).abs().mean()
            skill = skill.detach()  # each level learns from its own labels
        losses["action"] = l1(self.predict(images, tokens, proprio, skill), target, mask)
        return losses

    @torch.no_grad()
    def act(self, frames, wrist, proprio, texts):
        """Observations of B environments, frames and wrist (B, S, S, 3) uint8 or None, proprio (B, P)
        -> actions (B, chunk, A) in true units and the skill (B, D), None when flat; numpy arrays."""
        device = self.target_mean.device
        images = np.stack([frames, wrist][: self.shape["cameras"]], axis=1)
        images = torch.from_numpy(images).to(device).permute(0, 1, 4, 2, 3).float() / 255
        tokens = torch.stack([tokenize(text, self.t5) for text in texts]).to(device)
        proprio = torch.from_numpy(proprio).float().to(device)
        skill = self.predict_skill(images, tokens)
        actions = self.predict(images, tokens, proprio, skill).clamp(-1, 1)
        actions = (actions * self.target_scale + self.target_mean).cpu().numpy()
        if skill is None:
            return actions, None
        return actions, (skill * self.skill_scale + self.skill_mean).cpu().numpy()


# ------------------------------------------------------------------------------------------- data
class Labels:
    """Rows of some episodes of a packed set with a target (T, D), and perhaps a skill (T, D); the
    last gap frames of an episode have none."""

    def __init__(self, dataset, episodes, target, skill=None, gap=0, cameras=1, t5=None):
        self.dataset, self.cameras = dataset, cameras
        self.target, self.skill = target, skill
        self.rows = dataset.rows(episodes, gap)
        self.episode = np.repeat(np.arange(len(dataset.start)), dataset.length)  # of each row
        self.end = (dataset.start + dataset.length - gap)[self.episode]  # where its targets end
        self.tokens = torch.stack([tokenize(e["text"], t5) for e in dataset.episodes])

    def arrays(self):
        """What is learned from, for the checksum."""
        skill = [] if self.skill is None else [self.skill]
        return [self.dataset.frames, self.rows, self.target, self.tokens.numpy(), *skill]

    def batch(self, rows, chunk):
        """The arguments of Agent.forward for these rows, on the CPU."""
        after = rows[:, None] + np.arange(chunk)
        proprio = self.dataset.proprio
        batch = {"images": self.dataset.images(rows, self.cameras, "cpu")}
        batch["tokens"] = self.tokens[self.episode[rows]]
        batch["proprio"] = None if proprio is None else torch.from_numpy(proprio[rows])
        batch["target"] = torch.from_numpy(self.target[np.minimum(after, len(self.target) - 1)])
        batch["mask"] = torch.from_numpy(after < self.end[rows][:, None])
        batch["true_skill"] = None if self.skill is None else torch.from_numpy(self.skill[rows])
        return batch


def get_batch(labels, count, chunk, rng, device):
    """A batch of count rows, as many of each set, for Agent.forward. Where one set has no proprio,
    as people's video, none of the batch has."""
    share = max(1, count // len(labels))
    parts = [part.batch(rng.choice(part.rows, share), chunk) for part in labels]
    batch = {}
    for key in parts[0]:
        values = [part[key] for part in parts]
        missing = any(value is None for value in values)
        batch[key] = None if missing else torch.cat(values).to(device, non_blocking=True)
    return batch


def augment(images, amount):
    """Images (B, cameras, 3, S, S), for every variant alike: warped, shifted by up to a 64th of their
    side (proprio is not), contrast and brightness changed by a fifth."""
    b, cameras, _, size, _ = images.shape
    x = images.flatten(0, 1)
    if amount:
        x = warp(x, x, amount)[0]
    pad = size // 64
    if pad:
        x = F.pad(x, (pad,) * 4, mode="replicate")
        down, right = torch.randint(0, 2 * pad + 1, (2, len(x), 1)) + torch.arange(size)
        at = torch.arange(len(x))
        x = x.permute(0, 2, 3, 1)[at[:, None, None], down[:, :, None], right[:, None]]
        x = x.permute(0, 3, 1, 2)
    gain = 0.8 + 0.4 * torch.rand(b, 1, 1, 1, 1, device=x.device)
    offset = 0.4 + 0.2 * torch.rand(b, 1, 1, 1, 1, device=x.device)
    return ((x.reshape(images.shape) - 0.5) * gain + offset).clamp(0, 1)


def standardise(arrays, rows):
    """Arrays of several sets, jointly standardised over the given rows of each; their mean, scale."""
    used = np.concatenate([array[r] for array, r in zip(arrays, rows, strict=True)])
    mean, scale = used.mean(0), used.std(0) + 1e-6
    scaled = [((array - mean) / scale).astype(np.float32) for array in arrays]
    return scaled, {"mean": torch.from_numpy(mean), "scale": torch.from_numpy(scale)}


def load_stage(dataset, out, stage, control=None):
    """Vectors of a stage at frame rate, (T, D): 0 the latent actions, 1 and up the skills of stage
    2, or what --control makes of them."""
    if stage == 0:
        return load_latents(dataset, out)
    kind = "uniform" if control == "uniform" else "skills"
    path = Path(out, f"{kind}{stage}.{dataset.name}.npy")
    vectors = np.load(path) if path.exists() else np.zeros((0, 1))
    if len(vectors) != dataset.total or not np.isfinite(vectors).all():
        fail(
            f"{path} is missing or of other data: run `python skills.py` with the same --out first"
        )
    if control == "shuffled":  # each segment plays the vectors of a random other one
        marks = np.load(Path(out, f"boundaries.{dataset.name}.npy"))[:, stage - 1]
        starts, segment = np.flatnonzero(marks), np.cumsum(marks) - 1
        ends = np.append(starts[1:], len(marks))
        other = np.random.default_rng(0).permutation(len(starts))[segment]
        into = np.arange(len(marks)) - starts[segment]
        return vectors[np.minimum(starts[other] + into, ends[other] - 1)]
    return 0 * vectors if control == "constant" else vectors


def labelled_episodes(dataset, demos, tasks):
    """Training episodes to fine-tune on: the first demos of each task, or that share of them when it
    is a float; tasks: which, by their place in the list of names (None: all)."""
    train = dataset.split("train")
    of = np.array([dataset.episodes[e]["task"] for e in train])
    names = sorted(set(of), key=natural)
    if tasks and max(tasks) >= len(names):
        fail(f"--tasks {max(tasks)}: there are {len(names)} tasks, numbered from 0")
    chosen = []
    for name in [names[i] for i in tasks] if tasks else names:
        episodes = train[of == name]
        count = max(1, round(demos * len(episodes))) if isinstance(demos, float) else demos
        chosen.append(episodes[:count])
    return np.sort(np.concatenate(chosen))


def pretraining_name(args):
    """The name of a pretraining's files, which several fine-tunings share."""
    skill, action = VARIANTS[args.variant]
    name = ["policy_pretrain", f"z{skill}" if skill else "flat", f"z{action}"]
    return "_".join([*name, *sorted(args.video or []), *([args.control] if args.control else [])])


def prepare_pretraining(args, sets):
    """A new agent, and the video with its pseudo-labels zbar_t and z_t."""
    skill, action = VARIANTS[args.variant]
    gap = data.load_checkpoint(Path(args.out, "lam.pt"), "lam")["settings"]["gap"]
    video = [dataset for dataset in sets if dataset.name in (args.video or [dataset.name])]
    if args.video and len(video) < len(set(args.video)):
        fail(f"--video {' '.join(args.video)}: choose from {', '.join(d.name for d in sets)}")
    rows = [dataset.rows(dataset.split("train"), gap) for dataset in video]
    targets, _ = standardise([load_stage(d, args.out, action) for d in video], rows)
    skills, units = [None] * len(video), None
    if skill:
        raw = [load_stage(d, args.out, skill, args.control) for d in video]
        skills, units = standardise(raw, rows)
    cameras = 1 + all(dataset.wrist is not None for dataset in video)
    labels = []
    for dataset, target, vectors in zip(video, targets, skills, strict=True):
        train = dataset.split("train")
        labels.append(Labels(dataset, train, target, vectors, gap, cameras, args.text))
    shape = data_shape(sets) | {"high_cameras": cameras, "target": targets[0].shape[1]}
    agent = Agent(shape | {"skill": skills[0].shape[1] if skill else 0}, vars(args))
    if skill:
        agent.skill_mean.copy_(units["mean"])
        agent.skill_scale.copy_(units["scale"])
    return agent, labels


def prepare_finetuning(args, sets, pretrained):
    """An agent for real actions, and the labelled demonstrations. With a pretrained agent, pi_h is
    frozen and pi_l begins as pretraining left it, but for a new head; else all begins anew."""
    labelled = [dataset for dataset in sets if dataset.actions is not None]
    if not labelled:
        fail("none of the packed sets has actions: nothing to fine-tune on")
    episodes = [labelled_episodes(d, args.demos, args.tasks) for d in labelled]
    rows = [dataset.rows(e) for dataset, e in zip(labelled, episodes, strict=True)]
    actions = np.concatenate([d.actions[r] for d, r in zip(labelled, rows, strict=True)])
    proprio = np.concatenate([d.proprio[r] for d, r in zip(labelled, rows, strict=True)])
    mean = (actions.min(0) + actions.max(0)) / 2
    scale = np.maximum(np.ptp(actions, axis=0) / 2, 1e-3)  # actions in [-1, 1]
    shape = data_shape(sets)
    labels = []
    for dataset, e in zip(labelled, episodes, strict=True):
        target = ((dataset.actions - mean) / scale).astype(np.float32)
        labels.append(Labels(dataset, e, target, cameras=shape["cameras"], t5=args.text))
    shape["skill"] = 64 if VARIANTS[args.variant][0] else 0
    shape = dict(pretrained.shape if pretrained else shape) | {"target": len(mean)}
    agent = Agent(shape, vars(args))
    if pretrained:
        weights = pretrained.state_dict()
        kept = [key for key in weights if not key.startswith(("low.head", "target"))]
        agent.load_state_dict({key: weights[key] for key in kept}, strict=False)
        if agent.high is not None:
            agent.high.requires_grad_(False)  # pi_h is frozen
            agent.high_text.requires_grad_(False)
    agent.proprio_mean.copy_(torch.from_numpy(proprio.mean(0)))
    agent.proprio_scale.copy_(torch.from_numpy(proprio.std(0) + 1e-3))
    agent.target_mean.copy_(torch.from_numpy(mean))
    agent.target_scale.copy_(torch.from_numpy(scale))
    return agent, labels


def weights_checksum(agent):
    """Checksum of the weights that a fine-tuning begins with, 0 without pretraining."""
    return (
        data.checksum(*[p.detach().cpu().numpy().ravel() for p in agent.parameters()])
        if agent
        else 0
    )


def data_shape(sets):
    """What the networks must know of the data: frame size, number of cameras, width of proprio."""
    widths = [dataset.proprio.shape[1] for dataset in sets if dataset.proprio is not None]
    cameras = 1 + any(dataset.wrist is not None for dataset in sets)
    shape = {"size": sets[0].frames.shape[1], "proprio": max([1, *widths])}
    return shape | {"cameras": cameras, "high_cameras": cameras}


def load_agent(out, name, demos, device):
    """The fine-tuned policy NAME of a run folder, ready to act."""
    path = Path(out, f"policy_{name}_{demos}.pt")
    record = data.load_checkpoint(path, "policy_finetune")
    agent = Agent(record["shape"], record["settings"])
    data.load_weights(agent, record, path)
    return agent.to(device).eval()


# ----------------------------------------------------------------------------------------- report
def report(args, name, agent, sets):
    """On held-out demonstrations: the first action's l1 error over that of predicting the mean, the
    same of pi_h's skill; draws the actions of one demonstration."""
    agent.eval()
    dataset = [dataset for dataset in sets if dataset.actions is not None][0]
    stage, action = VARIANTS[args.variant]
    pairs = {"action": [], "skill": []}  # (predicted, true) of each demonstration
    for e in dataset.split("val")[:20]:
        rows = dataset.rows([e])
        wrist = None if dataset.wrist is None else dataset.wrist[rows]
        texts = [dataset.episodes[e]["text"]] * len(rows)
        chunks, skill = agent.act(dataset.frames[rows], wrist, dataset.proprio[rows], texts)
        pairs["action"].append((chunks[:, 0], dataset.actions[rows]))
        if stage and action is not None:
            true = load_stage(dataset, args.out, stage, args.control)[rows]
            pairs["skill"].append((skill, true))
    figures = {}
    print("on held-out demonstrations, l1 error over that of predicting the mean:")
    for key, found in pairs.items():
        if found:
            predicted, true = (np.concatenate(x) for x in zip(*found, strict=True))
            error = np.abs(predicted - true).sum() / np.abs(true - true.mean(0)).sum()
            figures[f"{key}_error"] = round(float(error), 4)
            print(f"  {key} {error:.2f}")
    write(Path(args.out, f"{name}.json"), figures)
    predicted, true = pairs["action"][0]
    figure = Figure((9, 1.4 * true.shape[1]), layout="constrained")
    for d, axis in enumerate(figure.subplots(true.shape[1], sharex=True)):
        axis.plot(true[:, d], "k", label="demonstration")
        axis.plot(predicted[:, d], "tab:orange", label=args.variant)
        axis.set_ylabel(f"action {d}")
    axis.set_xlabel("frame of a held-out demonstration")
    axis.legend(loc="upper right")
    write(Path(args.out, f"{name}.png"), figure)


def run_name(args):
    """The name of a run's files: the variant and what it was made from."""
    name = "_".join(["policy", args.variant, *sorted(args.video or [])])
    if args.control:
        name += f"_{args.control}"
    if args.tasks:
        name += f"_tasks{''.join(map(str, args.tasks))}"
    return f"{name}_{args.demos}"


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def main():
    args = get_args()
    device, rank, world = data.start(args.out, args.device)
    sets = data.open_sets(args.data)
    stage, action = VARIANTS[args.variant]
    agent, batch = None, args.batch * world
    for phase in ["pretrain", "finetune"] if action is not None else ["finetune"]:
        seed_all(args.seed)
        settings = vars(args) | {"world": world}
        if phase == "pretrain":
            agent, labels = prepare_pretraining(args, sets)
            steps, peak, name = args.pretrain_steps, args.lr, pretraining_name(args)
            for key in ("variant", "demos", "tasks", "steps", "finetune_lr"):
                del settings[key]  # they do not matter to pretraining
        else:
            steps, peak, name = args.steps, args.finetune_lr if agent else args.lr, run_name(args)
            settings["begun_with"] = weights_checksum(agent)
            agent, labels = prepare_finetuning(args, sets, agent)
        settings["labels"] = data.checksum(*[array for part in labels for array in part.arrays()])
        agent.to(device)
        learning = [p for p in agent.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=peak, weight_decay=1e-3, fused=True)
        path = Path(args.out, f"{name}.pt")
        first, log = data.resume(path, "policy_" + phase, settings, agent, optimizer)
        if args.compile:
            agent.compile()
        wrapped = nn.parallel.DistributedDataParallel(agent) if world > 1 else agent
        seen, begin = [], time.time()
        for step in tqdm(range(first, steps), name, disable=rank > 0 or None):
            rng = np.random.default_rng([args.seed, step])  # chance hangs on seed and step alone,
            torch.manual_seed(args.seed * 1_000_003 + step)  # so a resumed run repeats itself
            share = 0.525 + 0.475 * math.cos(math.pi * step / steps)  # a cosine to a twentieth
            for group in optimizer.param_groups:
                group["lr"] = peak * share * min(1, (step + 1) / 100)  # after a warm-up
            now = get_batch(labels, batch, args.chunk, rng, device)
            now = {key: None if x is None else x[rank::world] for key, x in now.items()}
            now["images"] = augment(now["images"], args.warp)
            with torch.autocast(device.type, torch.bfloat16, args.bf16):
                losses = wrapped(**now)  # of pi_h the skill's, of pi_l the action's
            optimizer.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(learning, 1.0)
            optimizer.step()
            seen.append({"step": step + 1} | {key: loss.item() for key, loss in losses.items()})
            if rank == 0 and ((step + 1) % args.log_every == 0 or step + 1 == steps):
                log.append(data.log_row(seen, name, first, begin))
                data.write_log(Path(args.out, name), log)
                record = {"stage": "policy_" + phase, "settings": settings, "shape": agent.shape}
                record |= {"step": step + 1, "steps": steps, "log": log}
                record |= {"model": agent.state_dict(), "optimizer": optimizer.state_dict()}
                write(path, record)
                seen = []
    if rank == 0:
        report(args, name, agent, sets)


if __name__ == "__main__":
    main()
