"""
Stage 3, the hierarchical policy (HiLAM, arXiv 2603.05815, section 3.3).

    pretraining on action-free video, with the pseudo-labels of stages 1 and 2:
        high level  pi_h(o_t, text)  -> zbar_t, the skill of frame t
        low level   pi_l(o_t, skill) -> z_t, z_{t+1}, ... latent actions, told pi_h's skill
    fine-tuning on a few labelled demonstrations: pi_h is frozen, so the text reaches the actions
    through the skill alone; pi_l gets a new head and learns real actions

Both have BAKU's architecture (NeurIPS 2024), smaller: an image encoder with FiLM by text or skill,
a token each for text or skill, cameras, proprio and ACTION, a causal transformer read at ACTION,
actions in chunks. The flat baseline is pi_l alone, told the text.

    python policy.py                    # toy world: HiLAM, 5 demonstrations a task, 3 minutes
    python policy.py --variant flat     # the same network without hierarchy and pretraining
    python policy.py --variant flat_z0  # pretrained on the same video, but without hierarchy

Writes to OUT: policy_NAME_DEMOS.pt .json .png (actions of a held-out demonstration) and a log with
its curve, the same of policy_pretrain_...; NAME is the variant with --video, --control, --tasks.
"""

import functools
import math
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
from skills import load_rows, stack

# Table 1 of the paper: stage of pi_h's skill, of pi_l's pretraining target (0: the latent action)
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
    add("--tasks", type=number(int, 0), nargs="+", help="labelled tasks, numbered by name")
    add("--pretrain-steps", type=COUNT, default=2500, help="besides --steps of fine-tuning")
    add("--video", nargs="+", help="names of the sets to pretrain on, if not all of --data")
    add("--control", choices=["shuffled", "constant", "uniform"], help="skills spoiled in this way")
    add("--low-text", action="store_true", help="tell pi_l the text as well as the skill")
    add = parser.add_argument_group("model and training").add_argument
    add("--text", metavar="T5", help="a frozen T5 reads the text: t5-small, or its folder")
    add("--chunk", type=COUNT, default=10, help="actions predicted at once; BAKU: 10")
    add("--patch", type=COUNT, default=4, help="pixels a patch; size / patch is 8, 16, 32 or 64")
    add("--channels", type=number(int, 8), default=32, help="channels at first, then twice as many")
    add("--width", type=number(int, 8), default=128, help="of a token; BAKU: 256")
    add("--layers", type=number(int, 0), default=2, help="blocks; BAKU: 8; 0: an MLP of all tokens")
    add("--warp", type=REAL, default=0.0, help="random affine maps of the images; LIBERO: 0.15")
    add("--batch", type=COUNT, default=64, help="frames a step and process, equally of each set")
    add("--lr", type=number(float, 1e-9), default=7e-4, help="peak, for new weights, of AdamW")
    add("--finetune-lr", type=number(float, 1e-9), default=3e-4, help="peak, for pretrained ones")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe: for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: for GPUs")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------- text
@functools.cache
def load_t5(name):
    """Tokenizer and encoder of a frozen T5, by its name on the Hugging Face hub or its folder."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel

        encoder = T5EncoderModel.from_pretrained(name).float().eval()
        return AutoTokenizer.from_pretrained(name), encoder
    except Exception as error:
        fail(f"--text {name}: no T5, or no `pip install transformers` ({str(error)[:150]!r})")


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
            fail(f"--patch {patch}: frames of {size} pixels make no grid of 8, 16, 32, 64 patches")
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
            look = (4 * x.flatten(2)).softmax(-1).view_as(x)  # spatial softmax: where each channel
            line = torch.linspace(-1, 1, x.shape[-1], device=x.device)  # looks (Levine et al. 2016)
            seen += [look.sum(2) @ line, look.sum(3) @ line]
        seen = torch.cat([*seen, self.fine(x, condition).flatten(1)], dim=1)
        scale, shift = self.select(condition).chunk(2, dim=1)  # FiLM: which of it matters
        return self.out(F.silu(self.look(seen) * (1 + scale) + shift))


class Policy(nn.Module):
    """Images (B, cameras, 3, S, S), text (B, W), skill (B, D), proprio (B, P) -> a chunk of vectors
    (B, chunk, outside). text and skill are their widths in __init__, 0 for one that is not told."""

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
            self.mix = nn.Sequential(*layers, nn.Linear(4 * width, width), nn.SiLU())
        self.head = nn.Linear(width, chunk * outside)

    def forward(self, images, text=None, skill=None, proprio=None):
        b, cameras = images.shape[:2]
        told = [] if self.text is None else [self.text(text)]
        if self.skill is not None:
            told.append(self.skill(skill))
        condition = told[0].repeat_interleave(cameras, 0)  # one encoder for all cameras, as in BAKU
        seen = self.image(images.flatten(0, 1), condition).view(b, cameras, -1)
        missing = self.no_camera.expand(b, self.cameras - cameras, -1)
        body = self.no_proprio.expand(b, -1) if proprio is None else self.proprio(proprio)
        last = torch.stack([body, *told[1:], self.action.expand(b, -1)], dim=1)
        tokens = torch.cat([told[0][:, None], seen, missing, last], dim=1)
        mixed = self.mix(tokens + self.kind).view(b, -1, tokens.shape[-1])
        return self.head(mixed[:, -1]).view(b, self.chunk, -1)  # read at ACTION


def l1(prediction, target, mask):
    """Mean absolute error over (B, chunk, D), 0 where mask (B, chunk) is False."""
    return ((prediction - target).abs().mean(-1) * mask).mean()


class Agent(nn.Module):
    """Both levels, or a flat policy, with the mean and scale of proprio, skill and target. shape: a
    dict of size, cameras, high_cameras and the widths of these three, skill 0 when flat."""

    def __init__(self, shape, settings):
        super().__init__()
        self.shape = shape
        self.t5 = settings["text"]
        width, skill = settings["width"], shape["skill"]
        seen = shape | {"cameras": shape["high_cameras"]}
        self.high_text = text_encoder(width, self.t5) if skill else None
        self.high = Policy(seen, width, 0, 1, skill, settings) if skill else None
        told = width if settings["low_text"] or not skill else 0
        self.low_text = text_encoder(width, self.t5) if told else None
        self.low = Policy(shape, told, skill, settings["chunk"], shape["target"], settings)
        for name in ("proprio", "skill", "target"):
            self.register_buffer(f"{name}_mean", torch.zeros(shape[name]))
            self.register_buffer(f"{name}_scale", torch.ones(shape[name]))

    def predict_skill(self, images, tokens):
        """pi_h(o_t, text): the standardised skill zbar (B, D) of these images; None when flat."""
        if self.high is None:
            return None
        return self.high(images[:, : self.shape["high_cameras"]], self.high_text(tokens))[:, 0]

    def predict(self, images, tokens, proprio, skill):
        """pi_l(o_t, skill): a chunk of normalised actions or latents, (B, chunk, target)."""
        text = self.low_text(tokens) if self.low_text else None
        if proprio is not None:
            proprio = (proprio - self.proprio_mean) / self.proprio_scale
        return self.low(images, text, skill, proprio)

    def forward(self, images, tokens, proprio, target, mask, true_skill=None):
        """The losses of a batch, a dict; true_skill (B, D) is given in pretraining only."""
        losses = {}
        skill = self.predict_skill(images, tokens)
        if true_skill is not None:
            losses["skill"] = (skill - true_skill).abs().mean()
            skill = skill.detach()  # each level learns from its own labels
        losses["action"] = l1(self.predict(images, tokens, proprio, skill), target, mask)
        return losses

    @torch.no_grad()
    def act(self, frames, wrist, proprio, texts):
        """Frames and wrist (B, S, S, 3) uint8 or None, proprio (B, P), B sentences -> actions (B,
        chunk, A) and skill (B, D), None when flat, both in true units. All are numpy arrays."""
        device = self.target_mean.device
        images = data.to_images([frames, wrist][: self.shape["cameras"]], device)
        tokens = torch.stack([tokenize(text, self.t5) for text in texts]).to(device)
        proprio = torch.from_numpy(proprio).float().to(device)
        skill = self.predict_skill(images, tokens)
        actions = self.predict(images, tokens, proprio, skill).clamp(-1, 1)
        actions = (actions * self.target_scale + self.target_mean).cpu().numpy()
        if skill is not None:
            skill = (skill * self.skill_scale + self.skill_mean).cpu().numpy()
        return actions, skill


# ------------------------------------------------------------------------------------------- data
class Labels:
    """Some episodes of a packed set with a target (T, D) and perhaps a skill (T, D); the last gap
    frames of an episode have none."""

    def __init__(self, dataset, episodes, target, skill=None, gap=0, cameras=1, t5=None):
        self.dataset, self.cameras, self.proprio = dataset, cameras, dataset.proprio
        self.target, self.skill = target, skill
        self.rows = dataset.rows(episodes, gap)
        self.episode = np.repeat(np.arange(len(dataset.start)), dataset.length)  # of each row
        self.end = (dataset.start + dataset.length - gap)[self.episode]  # where its targets end
        self.tokens = torch.stack([tokenize(e["text"], t5) for e in dataset.episodes])

    def batch(self, rows, chunk):
        """The arguments of Agent.forward for these rows, on the CPU."""
        after = rows[:, None] + np.arange(chunk)  # (B, chunk)
        batch = {"images": self.dataset.images(rows, self.cameras, "cpu")}
        batch["tokens"] = self.tokens[self.episode[rows]]
        batch["proprio"] = None if self.proprio is None else torch.from_numpy(self.proprio[rows])
        batch["target"] = torch.from_numpy(self.target[np.minimum(after, len(self.target) - 1)])
        batch["mask"] = torch.from_numpy(after < self.end[rows][:, None])
        batch["true_skill"] = None if self.skill is None else torch.from_numpy(self.skill[rows])
        return batch


def get_batch(labels, count, chunk, rng, device):
    """Agent.forward's arguments for count rows, as many of each set; None what one set lacks."""
    share = max(1, count // len(labels))
    parts = [part.batch(rng.choice(part.rows, share), chunk) for part in labels]
    batch = dict.fromkeys(parts[0])
    for key in batch:
        if all(part[key] is not None for part in parts):
            batch[key] = torch.cat([part[key] for part in parts]).to(device)
    return batch


def augment(images, amount):
    """Images (B, cameras, 3, S, S) warped, shifted by up to a 64th of their side, contrast
    changed by up to a fifth, brightness by up to a tenth."""
    x = images.flatten(0, 1)  # (B cameras, 3, S, S)
    if amount:
        x = warp(x, x, amount)[0]
    size = x.shape[-1]
    pad = size // 64
    if pad:
        corners = torch.randint(0, 2 * pad + 1, (2, len(x))).T.tolist()
        pairs = zip(F.pad(x, (pad,) * 4, mode="replicate"), corners, strict=True)
        x = torch.stack([image[:, i : i + size, j : j + size] for image, (i, j) in pairs])
    gain, offset = torch.rand(2, len(images), 1, 1, 1, 1, device=x.device)
    x = (x.view_as(images) - 0.5) * (0.8 + 0.4 * gain) + (0.4 + 0.2 * offset)
    return x.clamp(0, 1)


def load_stage(dataset, out, stage, control=None):
    """A stage at frame rate, (T, D): 0 the latent actions, else skills. control: skills of random
    other segments (shuffled), zeros (constant), skills of a uniform cut (uniform)."""
    if stage == 0:
        return load_rows(dataset, out, "latents", "lam.py")
    kind = "uniform" if control == "uniform" else "skills"
    vectors = load_rows(dataset, out, f"{kind}{stage}", "skills.py")
    if control == "constant":
        return 0 * vectors
    if control == "shuffled":
        marks = np.load(Path(out, f"boundaries.{dataset.name}.npy"))[:, stage - 1]
        starts, segment = np.flatnonzero(marks), np.cumsum(marks) - 1
        ends = np.append(starts[1:], len(marks))
        other = np.random.default_rng(0).permutation(len(starts))[segment]
        into = np.arange(len(marks)) - starts[segment]
        return vectors[np.minimum(starts[other] + into, ends[other] - 1)]
    return vectors


def labelled_episodes(dataset, demos, tasks):
    """The first demos training episodes (float: that share) of the tasks with these numbers."""
    train = dataset.split("train")
    of = np.array([dataset.episodes[e]["task"] for e in train])
    names = sorted(set(of), key=natural)
    if tasks and max(tasks) >= len(names):
        fail(f"--tasks {max(tasks)}: there are {len(names)} tasks, numbered from 0")
    chosen = []
    for i in tasks or range(len(names)):
        episodes = train[of == names[i]]
        count = max(1, round(demos * len(episodes))) if isinstance(demos, float) else demos
        chosen.append(episodes[:count])
    return np.sort(np.concatenate(chosen))


def data_shape(sets):
    """The part of Agent's shape that the sets decide; exits with nothing to fine-tune on."""
    if all(d.actions is None for d in sets):
        fail("none of the packed sets has actions: nothing to fine-tune on")
    if any(d.proprio is None for d in sets if d.actions is not None):
        fail("a packed set with actions needs proprio too")
    size = sets[0].frames.shape[1]
    cameras = 1 + any(d.wrist is not None for d in sets)
    proprio = max(1 if d.proprio is None else d.proprio.shape[1] for d in sets)
    return {"size": size, "cameras": cameras, "high_cameras": cameras, "proprio": proprio}


def standardise(labels, key):
    """Standardise "target" or "skill" of several Labels together; returns mean and deviation."""
    used = np.concatenate([getattr(part, key)[part.rows] for part in labels])
    mean, deviation = used.mean(0), used.std(0) + 1e-6
    for part in labels:
        setattr(part, key, ((getattr(part, key) - mean) / deviation).astype(np.float32))
    return torch.from_numpy(mean), torch.from_numpy(deviation)


def prepare_pretraining(args, sets):
    """A new agent, and the video with its pseudo-labels."""
    skill, action = VARIANTS[args.variant]
    gap = data.load_checkpoint(Path(args.out, "lam.pt"), "lam")["settings"]["gap"]
    names = args.video or [d.name for d in sets]
    video = [d for d in sets if d.name in names]
    if len(video) < len(set(names)):
        fail(f"--video {' '.join(names)}: choose from {', '.join(d.name for d in sets)}")
    shape = data_shape(sets) | {"high_cameras": 1 + all(d.wrist is not None for d in video)}
    labels = []
    for d in video:
        z = load_stage(d, args.out, action)
        zbar = load_stage(d, args.out, skill, args.control) if skill else None
        episodes = d.split("train")
        labels.append(Labels(d, episodes, z, zbar, gap, shape["high_cameras"], args.text))
        labels[-1].proprio = None  # people's video has none
    shape |= {"skill": zbar.shape[1] if skill else 0, "target": z.shape[1]}
    agent = Agent(shape, vars(args))
    standardise(labels, "target")
    if skill:
        agent.skill_mean, agent.skill_scale = standardise(labels, "skill")
    return agent, labels


def prepare_finetuning(args, sets, pretrained):
    """An agent for real actions, new or from a pretrained one, and the labelled demonstrations."""
    shape = data_shape(sets) | {"skill": 64 if VARIANTS[args.variant][0] else 0}
    labels = []
    for d in [d for d in sets if d.actions is not None]:
        episodes = labelled_episodes(d, args.demos, args.tasks)
        labels.append(Labels(d, episodes, d.actions, None, 0, shape["cameras"], args.text))
    proprio = np.concatenate([part.dataset.proprio[part.rows] for part in labels])
    actions = np.concatenate([part.target[part.rows] for part in labels])
    mean = (actions.min(0) + actions.max(0)) / 2
    scale = np.maximum(np.ptp(actions, axis=0) / 2, 1e-3)
    for part in labels:
        part.target = ((part.target - mean) / scale).astype(np.float32)  # in [-1, 1]
    agent = Agent((pretrained.shape if pretrained else shape) | {"target": len(mean)}, vars(args))
    if pretrained:
        weights = pretrained.state_dict()
        kept = [key for key in weights if not key.startswith(("low.head", "target"))]
        agent.load_state_dict({key: weights[key] for key in kept}, strict=False)
        for key, parameter in agent.named_parameters():
            parameter.requires_grad_(not key.startswith("high"))  # pi_h is frozen
    agent.proprio_mean = torch.from_numpy(proprio.mean(0))
    agent.proprio_scale = torch.from_numpy(proprio.std(0) + 1e-3)
    agent.target_mean, agent.target_scale = torch.from_numpy(mean), torch.from_numpy(scale)
    return agent, labels


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
    same of the skill after pretraining; draws the actions of one demonstration."""
    agent.eval()
    dataset = [d for d in sets if d.actions is not None][0]
    stage, action = VARIANTS[args.variant]
    found = []
    episodes = dataset.split("val")[:20]
    for e in episodes:
        rows = dataset.rows([e])
        wrist = None if dataset.wrist is None else dataset.wrist[rows]
        texts = [dataset.episodes[e]["text"]] * len(rows)
        found.append(agent.act(dataset.frames[rows], wrist, dataset.proprio[rows], texts))
    rows = dataset.rows(episodes)
    actions = np.concatenate([chunks[:, 0] for chunks, _ in found])
    pairs = {"action": (actions, dataset.actions[rows])}
    if stage and action is not None:
        true = load_stage(dataset, args.out, stage, args.control)[rows]
        pairs["skill"] = (np.concatenate([skill for _, skill in found]), true)
    errors = {}
    for key, (predicted, true) in pairs.items():
        error = np.abs(predicted - true).sum() / np.abs(true - true.mean(0)).sum()
        errors[f"{key}_error"] = round(float(error), 4)
        print(f"held-out {key}: l1 error over that of predicting the mean {error:.2f}")
    write(Path(args.out, f"{name}.json"), errors)
    first = slice(dataset.length[episodes[0]])  # the frames of one demonstration
    width = actions.shape[1]
    figure = Figure((9, 1.4 * width), layout="constrained")
    for d, axis in enumerate(figure.subplots(width, sharex=True)):
        axis.plot(pairs["action"][1][first, d], "k", label="demonstration")
        axis.plot(actions[first, d], "tab:orange", label=args.variant)
        axis.set_ylabel(f"action {d}")
    axis.set_xlabel("frame of a held-out demonstration")
    axis.legend(loc="upper right")
    write(Path(args.out, f"{name}.png"), figure)


def run_name(args, phase):
    """The name of a phase's files. Several fine-tunings share a pretraining."""
    skill, action = VARIANTS[args.variant]
    parts = [*sorted(args.video or []), args.control, "lowtext" if args.low_text else None]
    if phase == "pretrain":
        parts = ["policy_pretrain", f"z{skill}" if skill else "flat", f"z{action}", *parts]
    else:
        tasks = "tasks" + "".join(map(str, args.tasks)) if args.tasks else None
        parts = ["policy", args.variant, *parts, tasks, str(args.demos)]
    return "_".join(part for part in parts if part)


def main():
    args = get_args()
    device, rank, world = data.start(args.out, args.device)
    sets = data.open_sets(args.data)
    agent = None
    for phase in ["finetune"] if VARIANTS[args.variant][1] is None else ["pretrain", "finetune"]:
        torch.manual_seed(args.seed)
        name = run_name(args, phase)
        settings = vars(args) | {"world": world}
        if phase == "pretrain":
            steps, peak = args.pretrain_steps, args.lr
            agent, labels = prepare_pretraining(args, sets)
            for key in ("variant", "demos", "tasks", "steps", "finetune_lr"):
                del settings[key]  # they do not matter to pretraining
        else:
            steps, peak = args.steps, (args.finetune_lr if agent else args.lr)
            agent, labels = prepare_finetuning(args, sets, agent)
        sample = get_batch(labels, 256, args.chunk, np.random.default_rng(0), "cpu")
        begin_with = [*sample.values(), *agent.state_dict().values()]
        settings["begin_with"] = data.checksum(*[x.numpy() for x in begin_with if x is not None])
        agent.to(device)
        learning = [p for p in agent.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=peak, weight_decay=1e-3, fused=True)
        path = Path(args.out, f"{name}.pt")
        first, log = data.resume(path, "policy_" + phase, settings, agent, optimizer)
        if args.compile:
            agent.compile()
        wrapped = agent
        if world > 1:  # video has no proprio, so not all weights take part in every step
            wrapped = nn.parallel.DistributedDataParallel(agent, find_unused_parameters=True)
        seen, begin = [], time.time()
        for step in tqdm(range(first, steps), name, disable=rank > 0 or None):
            rng = np.random.default_rng([args.seed, step])  # chance hangs on seed and step alone,
            torch.manual_seed(args.seed * 1_000_003 + step)  # so a resumed run repeats itself
            share = 0.525 + 0.475 * math.cos(math.pi * step / steps)  # a cosine to a twentieth
            for group in optimizer.param_groups:
                group["lr"] = peak * share * min(1, (step + 1) / 100)  # after a warm-up
            batch = get_batch(labels, args.batch * world, args.chunk, rng, device)
            batch["images"] = augment(batch["images"], args.warp)
            batch = {key: None if x is None else x[rank::world] for key, x in batch.items()}
            with torch.autocast(device.type, torch.bfloat16, args.bf16):
                losses = wrapped(**batch)  # of pi_h the skill's, of pi_l the action's
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
