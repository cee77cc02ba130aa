"""
Stage 3, the hierarchical policy: from frames and a sentence to a skill, and from frames and the skill to actions.

    pretrain, on action-free video with the pseudo-labels of stages 1 and 2 (HiLAM, arXiv 2603.05815, section 3.3):
        high level   pi_h(o_t, text)  -> skill of frame t, zbar^h_t
        low level    pi_l(o_t, text, skill) -> latent actions z^l_t, z^l_{t+1}, ...  skill: what pi_h predicts
    fine-tune, on --demos labelled demonstrations: pi_h is FROZEN, pi_l's head is replaced and trained on real actions

Both have BAKU's architecture (NeurIPS 2024), smaller: an image encoder with FiLM by the text, one token each for text, cameras, proprio,
skill and ACTION, a causal transformer read at ACTION (--layers 0: an MLP over all tokens); actions come in chunks. The flat baseline is the
same network without skill token and pretraining, on the same labelled data, with the same steps, batch and augmentation.

    python policy.py                          # toy world: hilam and flat on 10 % of the demonstrations, 8 minutes on two CPU cores
    python policy.py --variant flat --demos 5 --data data/libero_object --out out/libero_object --steps 4000
Writes policy_pretrain_SKILL_ACTION.pt, policy_VARIANT_DEMOS.pt (with VIDEO and CONTROL in the name), policy.json and policy.png into OUT.
"""
import argparse, collections, functools, itertools, json, time, warnings, zlib
from pathlib import Path
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure
from sklearn import kernel_ridge, metrics
from tqdm import tqdm
from data import RANK, WORLD, fail, fingerprint, load_checkpoint, load_weights, open_sets, standardise, write
from lam import Block, ConvBlock, descend, pooled, resume, save_checkpoint, setup, stage_parser, step_rng, warp
from skills import load_latents

# variant: (stage of the skill that pi_h predicts, stage of the vectors that pi_l is pretrained on; 0: the latent action); None: not there.
# The rows of the paper's Table 1; and _decoded, fine-tuned on the video too, with actions that decoded() reads from its latents.
VARIANTS = {"hilam": (2, 0), "hilam_z1_z0": (1, 0), "hilam_z2_z1": (2, 1), "hilam_scratch": (2, None), "hilam_decoded": (2, 0),
            "flat": (None, None), "flat_z0": (None, 0), "flat_z2": (None, 2), "flat_z0_decoded": (None, 0)}
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)
CONTROLS, WORDS, LONGEST = ("shuffled", "constant", "uniform"), 4096, 32     # buckets words are hashed into; most words of a sentence
def get_args(argv=None):
    parser = stage_parser(__doc__, steps=1500)
    add = parser.add_argument_group("experiment").add_argument
    add("--variant", nargs="+", choices=VARIANTS, default=["hilam", "flat"], help="what to train (default: hilam flat)")
    add("--demos", type=amount, nargs="+", default=[0.1], help="labelled demonstrations a task: counts (5) or shares (0.1; 1.0 is all)")
    add("--pretrain-steps", type=int, default=2500, help="steps of pretraining; --steps counts fine-tuning (default: %(default)s)")
    add("--video", nargs="+", help="packed sets to pretrain on, of those in --data; their names become part of the run's (default: all)")
    add("--control", choices=CONTROLS, help="spoil the skills: shuffled, constant, or cut uniformly (not of flat*); joins the run's name")
    add = parser.add_argument_group("model and optimizer").add_argument
    add("--text", metavar="T5", help="a frozen T5 to read sentences, t5-small or a folder; not in the name (default: our encoder)")
    add("--chunk", type=int, default=10, help="actions predicted at once; 10 in BAKU (default: %(default)s)")
    add("--channels", type=int, default=32, help="channels of the image encoder's first layer, half of the next (default: %(default)s)")
    add("--width", type=int, default=128, help="token width; 256 in BAKU (default: %(default)s)")
    add("--layers", type=int, default=2, help="transformer blocks; 8 in BAKU; 0: an MLP over the joined tokens (default: %(default)s)")
    add("--no-low-text", dest="low_text", action="store_false", help="tell the low level the skill only, not the text as well")
    add("--warp", type=float, default=0.0, help="augmentation: random affine maps of each camera's image; 0 is none (default: %(default)s)")
    add("--batch", type=int, default=64, help="frames a step, shared equally by the sets (default: %(default)s)")
    add("--bf16", action="store_true", help="compute in bfloat16 where it is safe (autocast): for GPUs")
    add("--compile", action="store_true", help="torch.compile the networks: a minute at the start, faster steps after it on GPUs")
    add("--lr", type=float, default=7e-4, help="peak learning rate of AdamW (default: %(default)s)")
    add("--finetune-lr", type=float, default=3e-4, help="the same where pretrained weights are fine-tuned (default: %(default)s)")
    return parser.parse_args(argv)
def amount(text):
    """'5' -> 5, a count; '0.1' -> 0.1, a share."""
    value = float(text) if "." in text else int(text)
    if value <= 0 or isinstance(value, float) and value > 1:
        raise argparse.ArgumentTypeError(f"{text}: a count (5) or a share (0.1, at most 1.0)")
    return value

# ---------------------------------------------------------------- models
@functools.cache
def t5(name):
    """Tokenizer and encoder of a T5 (a name on the Hugging Face hub, or a folder), frozen. Exits where there is none."""
    try:
        from transformers import AutoTokenizer, T5EncoderModel
        return AutoTokenizer.from_pretrained(name), T5EncoderModel.from_pretrained(name).float().eval()
    except Exception as error:
        fail(f"--text {name}: {' '.join(str(error).split())[:200]} (needs `pip install transformers` and a T5's name or folder)")
@functools.cache
def tokenize(text, name=None):
    """A sentence: its words, and words with their place, hashed into buckets, (64,) int64, 0 is padding; or the mean state of T5, (D,)."""
    if name:
        tokenizer, encoder = t5(name)
        return encoder(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).detach()
    keys = [key for i, word in enumerate(text.lower().split()[:LONGEST]) for key in (word, f"{i} {word}")]
    return torch.tensor([1 + zlib.crc32(key.encode()) % WORDS for key in keys] + [0] * (2 * LONGEST - len(keys)))
def text_encoder(width, name=None):
    """Normalised sum of embeddings of words and placed words (a mean drowns the few that differ), or T5's vector projected: (B, width)."""
    words = nn.Linear(t5(name)[1].config.d_model, width) if name else nn.EmbeddingBag(WORDS + 1, width, mode="sum", padding_idx=0)
    return nn.Sequential(collections.OrderedDict(words=words, norm=nn.LayerNorm(width)))
class Policy(nn.Module):
    """One level: images, the text's vector and perhaps a skill -> a chunk of vectors. text 0 or skill 0: built without it.
    images (B, cameras, 3, S, S), text (B, W) or None, skill (B, skill) or None, proprio (B, P) or None -> (B, chunk, out)."""
    def __init__(self, size, cameras, proprio, text, skill, out, chunk, args):
        super().__init__()
        w, c, stride, self.chunk, self.cameras = args.width, args.channels, 1 + (size > 32), chunk, cameras
        self.patch, self.grid, tokens = size // 16 // stride, 16 * stride, cameras + 2 + (text > 0) + (skill > 0)     # finer above 32 px
        token = lambda n: nn.Sequential(nn.Linear(n, w), nn.LayerNorm(w), nn.SiLU(), nn.Linear(w, w), nn.LayerNorm(w)) if n else None
        self.text, self.skill = token(text), token(skill)
        self.conv = nn.ModuleList([ConvBlock(*n, w) for n in ((3 * self.patch ** 2 + 2, c, stride), (c, 2 * c, 2), (2 * c, 2 * c, 1))])
        self.fine = ConvBlock(2 * c, 16, 1, w)                     # 8 x 8 x 16, kept whole: fine differences of place
        self.look, self.select, self.image = nn.Linear(10 * c + 16 * 64, 2 * w), nn.Linear(w, 4 * w), nn.Linear(2 * w, w)
        self.proprio = nn.Sequential(nn.Linear(max(1, proprio), w), nn.SiLU(), nn.Linear(w, w))
        self.no_proprio, self.no_camera = nn.Parameter(torch.zeros(w)), nn.Parameter(torch.zeros(w))         # human video has neither
        self.action, self.kind = nn.Parameter(0.02 * torch.randn(w)), nn.Parameter(0.02 * torch.randn(tokens, w))
        self.blocks, self.norm = nn.Sequential(*[Block(w) for _ in range(args.layers)]), nn.RMSNorm(w)
        self.mlp = None if args.layers else nn.Sequential(nn.Linear(tokens * w, 4 * w), nn.SiLU(), nn.Linear(4 * w, 4 * w), nn.SiLU())
        self.head = nn.Linear(w if args.layers else 4 * w, chunk * out)
    def forward(self, images, text=None, skill=None, proprio=None):
        b, cameras, *_ = images.shape
        told = [net(x) for net, x in ((self.text, text), (self.skill, skill)) if net is not None]             # (B, W) each
        each = told[0].repeat_interleave(cameras, 0)                               # one encoder for all cameras, as in BAKU
        x = F.pixel_unshuffle(images.flatten(0, 1) - 0.5, self.patch)              # (B * cameras, ., grid, grid)
        place, seen = torch.linspace(-1, 1, self.grid, device=x.device).expand(x.shape[0], 1, self.grid, self.grid), []
        x = torch.cat([x, place, place.transpose(2, 3)], 1)
        for block in self.conv:                                                    # spatial softmax (Levine et al. 2016) of every layer:
            x = block(x, each)                                                     # where each channel looks, sharpened
            at, line = (4 * x.flatten(2)).softmax(-1).view_as(x), torch.linspace(-1, 1, x.shape[-1], device=x.device)
            seen += [at.sum(2) @ line, at.sum(3) @ line]
        scale, shift = self.select(each).chunk(2, 1)                               # FiLM again: the text selects among the places
        x = self.look(torch.cat(seen + [self.fine(x, each).flatten(1)], 1)) * (1 + scale) + shift
        x = self.image(F.silu(x)).view(b, cameras, -1)
        x = torch.cat([x, self.no_camera.expand(b, self.cameras - cameras, -1)], 1)
        body = self.no_proprio.expand(b, -1) if proprio is None else self.proprio(proprio)
        tokens = torch.stack([*told[:1], *x.unbind(1), body, *told[1:], self.action.expand(b, -1)], 1) + self.kind
        return self.head(self.mlp(tokens.flatten(1)) if self.mlp else self.norm(self.blocks(tokens)[:, -1])).view(b, self.chunk, -1)
class Agent(nn.Module):
    """Both levels, or a flat policy, with the statistics that normalise proprio and actions. act() is what stage 4 calls.
    shape: dict(size, cameras, high_cameras, proprio, skill, target) of the data; the last three are widths, skill 0 for a flat policy."""
    def __init__(self, shape, args):
        super().__init__()
        w, self.shape, self.low_text, self.t5, self.traced = args.width, shape, args.low_text or not shape["skill"], args.text, {}
        make = lambda cameras, *rest: Policy(shape["size"], cameras, shape["proprio"], *rest, args)
        self.high_text = text_encoder(w, self.t5) if shape["skill"] else None
        self.high = make(shape["high_cameras"], w, 0, shape["skill"], 1) if shape["skill"] else None
        self.text = text_encoder(w, self.t5) if self.low_text else None
        self.low = make(shape["cameras"], w * self.low_text, shape["skill"], shape["target"], args.chunk)
        for key, (name, fill) in itertools.product(("proprio", "target", "skill"), dict(mean=torch.zeros, scale=torch.ones).items()):
            self.register_buffer(f"{key}_{name}", fill(shape[key]))
    def skill(self, images, tokens):
        """pi_h: the standardised skill (B, skill) that the text asks for in these images; None without a high level."""
        return self.high and self.high(images[:, :self.shape["high_cameras"]], self.high_text(tokens))[:, 0]
    def forward(self, images, tokens, proprio=None, skill=None):
        """pi_l: normalised targets (B, chunk, target). skill (B, skill): pi_h's, computed here when it is not given."""
        skill = self.skill(images, tokens) if skill is None else skill
        proprio = None if proprio is None else (proprio - self.proprio_mean) / self.proprio_scale
        return self.low(images, self.text(tokens) if self.low_text else None, skill, proprio)
    def decide(self, images, tokens, proprio):
        """Actions (B, chunk, A) and skill (B, D), D = 0 without a high level, both in true units."""
        skill = self.skill(images, tokens)
        actions = self(images, tokens, proprio, skill).clamp(-1, 1) * self.target_scale + self.target_mean
        return actions, actions[:, 0, :0] if skill is None else skill * self.skill_scale + self.skill_mean
    @torch.no_grad()
    def act(self, frames, wrist, proprio, texts):
        """Observations of B environments, frames and wrist (B, S, S, 3) uint8 -> what decide() gives, as numpy arrays."""
        images, device = np.stack([frames, wrist][:self.shape["cameras"]], 1), self.target_mean.device
        images = torch.from_numpy(images).to(device).permute(0, 1, 4, 2, 3).float() / 255
        tokens, proprio = torch.stack([tokenize(t, self.t5) for t in texts]), torch.from_numpy(proprio).float()
        seen, net = (images, tokens.to(device), proprio.to(device)), self
        if len(images) == 1:                                                       # one robot: half of the time would be Python's
            net = self.traced[0] = self.traced.get(0) or torch.jit.trace_module(self, dict(decide=seen))
        return [x.cpu().numpy() for x in net.decide(*seen)]

# ---------------------------------------------------------------- data
class Labels:
    """Rows of some episodes of a packed set with their targets: an array of length T, normalised; valid where the target exists."""
    def __init__(self, dataset, episodes, target, skill=None, gap=0, t5=None):
        self.dataset, self.target, self.skill = dataset, target, skill
        self.rows, self.episode = dataset.rows(episodes, gap), np.repeat(np.arange(len(dataset.start)), dataset.length)
        self.last = dataset.start + dataset.length - 1 - gap                      # of each episode, the last row that has a target
        self.tokens = torch.stack([tokenize(e["text"], t5) for e in dataset.episodes])
    def batch(self, rows, chunk, cameras, device):
        """images, tokens, proprio (or None), target (B, chunk, D), mask (B, chunk) False past the episode's end, skill (or None)."""
        d, t = self.dataset, rows[:, None] + np.arange(chunk)
        image = np.stack([d.frames[rows]] + ([d.wrist[rows]] if cameras > 1 and d.wrist is not None else []), 1)
        images = torch.from_numpy(image).to(device).permute(0, 1, 4, 2, 3).float() / 255
        at = lambda array, index: None if array is None else torch.from_numpy(array[index]).to(device)
        target, mask = at(self.target, np.minimum(t, d.total - 1)), at(t <= self.last[self.episode[rows]][:, None], ...)
        return images, self.tokens[self.episode[rows]].to(device), at(d.proprio, rows), target, mask, at(self.skill, rows)
def augment(images, amount):
    """For every variant alike: contrast and brightness by +-20 %, each camera warped, and shifted by up to a 64th (proprio is not)."""
    (b, n, c, s, _), pad = images.shape, images.shape[-1] // 64
    images = warp([images.flatten(1, 2)], amount)[0].view_as(images) if amount else images
    x = F.pad(images.flatten(0, 1), (pad,) * 4, mode="replicate")
    dy, dx = torch.randint(0, 2 * pad + 1, (2, b * n, 1), device=x.device) + torch.arange(s, device=x.device)
    x = x[torch.arange(b * n, device=x.device)[:, None, None], :, dy[:, :, None], dx[:, None, :]]         # (B * cameras, S, S, 3)
    gain, offset = 0.8 + 0.4 * torch.rand(2, b, 1, 1, 1, 1, device=x.device)
    return ((x.permute(0, 3, 1, 2).view(b, n, c, s, s) - 0.5) * gain + 0.5 * offset).clamp(0, 1)
def load_stage(dataset, out, stage, control=None):
    """Vectors of a stage at frame rate, (T, D): 0 the latent actions, 1 and up the skills of stage 2, or what --control makes of them."""
    if stage == 0: return load_latents(dataset, out)
    path = Path(out, f"{'uniform' if control == 'uniform' else 'skills'}{stage}.{dataset.name}.npy")
    if not path.exists() or len(vectors := np.load(path)) != dataset.total:
        fail(f"{path} is missing or of other data: run `python skills.py` with the same --data and --out first")
    if control == "shuffled":                                                    # each segment gets the vector of a random one
        values, which = np.unique(vectors, axis=0, return_inverse=True)
        return np.random.default_rng(0).permutation(values)[which.ravel()]
    return 0 * vectors if control == "constant" else vectors

# ---------------------------------------------------------------- training
def l1(prediction, target, mask):
    """Mean absolute error over (B, chunk, D) where mask (B, chunk): targets past an episode's end do not count."""
    return ((prediction - target).abs().mean(-1) * mask).sum() / pooled(mask.sum()).clamp_min(1)
def train(agent, labels, args, path, stage, device, objective):
    """The loop of both phases. objective(batch) -> dict of losses, whose sum is descended. Returns the last means and the seconds."""
    optimizer = torch.optim.AdamW([p for p in agent.parameters() if p.requires_grad], lr=args.lr, weight_decay=1e-3, fused=True)
    (first, begin), seen, mean = resume(path, stage, args, agent, optimizer), [], {}
    share = WORLD * -(-args.batch // len(labels))
    [level.compile() for level in (agent.high, agent.low) if args.compile and level is not None]
    for step in tqdm(range(first, args.steps), path.stem, initial=first, total=args.steps, disable=None):
        rng = step_rng(args.seed, step)
        batches = [part.batch(rng.choice(part.rows, share)[RANK::WORLD], args.chunk, agent.shape["cameras"], device) for part in labels]
        with torch.autocast(device.type, torch.bfloat16, args.bf16):
            records = [objective(augment(images, args.warp), *rest) for images, *rest in batches]
        loss = sum(sum(r.values()) for r in records) / len(records)
        descend(loss, optimizer, step, args)
        seen.append({k: np.mean([pooled(r[k]).item() for r in records]) for k in records[0]})
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            mean = {k: float(np.mean([s[k] for s in seen[-args.log_every:]])) for k in seen[-1]}
            speed = (step + 1) * args.batch * WORLD / (time.time() - begin)
            tqdm.write(f"{path.stem} step {step + 1:6d}  " + "  ".join(f"{k} {v:.3f}" for k, v in mean.items()) + f"  {speed:.0f} frames/s")
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(path, stage, args, step + 1, agent, optimizer, begin, shape=agent.shape)
    return mean, time.time() - begin
def pretrain(args, sets, skill, action, device):
    """Both levels on pseudo-labels: pi_h predicts zbar^skill, pi_l (or a flat policy, skill None) a chunk of stage `action` vectors."""
    path = Path(args.out, f"policy_pretrain_{'z%d_' % skill if skill else ''}z{action}{args.suffix}.pt")
    video = [s for s in sets if s.name in (args.video or [s.name])]
    len(video) == len({*(args.video or video)}) or fail(f"--video {' '.join(args.video)}: choose from {', '.join(s.name for s in sets)}")
    rows = [s.rows(s.split("train"), args.gap) for s in video]
    targets, *_ = standardise([load_stage(s, args.out, action) for s in video], rows)
    skills, *units = standardise([load_stage(s, args.out, skill, args.control) for s in video], rows) if skill else ([None] * len(video),)
    labels = [Labels(s, s.split("train"), t, k, args.gap, args.text) for s, t, k in zip(video, targets, skills)]
    shape = data_shape(sets) | dict(target=targets[0].shape[1], skill=skills[0].shape[1] if skill else 0)
    shape["high_cameras"] = 1 + all(s.wrist is not None for s in video)
    own = argparse.Namespace(**vars(args) | dict(variant=None, demos=None, finetune_lr=None, steps=args.pretrain_steps,
                                                 data_checksum=fingerprint(*targets, *(k for k in skills if k is not None))))
    agent = Agent(shape, args).to(device)
    [buffer.copy_(value) for buffer, value in zip((agent.skill_mean, agent.skill_scale), units)]
    def objective(images, tokens, proprio, target, mask, label):                 # video has no proprio
        told = agent.skill(images, tokens)
        terms = dict(skill=l1(told[:, None], label[:, None], torch.ones_like(mask[:, :1]))) if skill else {}
        return terms | dict(latent=l1(agent(images, tokens, None, told.detach() if skill else None), target, mask))
    return agent, path.stem, *train(agent, labels, own, path, "policy_pretrain", device, objective)
def finetune(args, sets, pretrained, device):
    """The acting level on labelled demonstrations. The high level stays as pretraining left it; without pretraining it is trained along."""
    labelled = [s for s in sets if s.actions is not None] or fail("none of the packed sets has actions: nothing to fine-tune on")
    episodes, name = [s.chosen(args.demos) for s in labelled], f"policy_{args.variant}{args.suffix}_{args.demos}"
    all(np.isfinite(s.actions).all() for s in labelled) or fail(f"NaN or infinity in the actions of {', '.join(s.name for s in labelled)}")
    used = [np.concatenate([getattr(s, key)[s.rows(e)] for s, e in zip(labelled, episodes)]) for key in ("proprio", "actions")]
    mean, scale = (used[1].min(0) + used[1].max(0)) / 2, np.maximum(np.ptp(used[1], 0) / 2, 1e-3)        # actions in [-1, 1]
    labels = [Labels(s, e, ((s.actions - mean) / scale).astype(np.float32), t5=args.text) for s, e in zip(labelled, episodes)]
    labels = decoded(args, sets, labels) if args.variant.endswith("decoded") else labels
    shape = dict(pretrained.shape if pretrained else data_shape(sets) | dict(skill=64 * bool(VARIANTS[args.variant][0])), target=len(mean))
    torch.manual_seed(args.seed)
    agent = Agent(shape, args).to(device)
    kept = {k: v for k, v in (pretrained.state_dict() if pretrained else {}).items() if not k.startswith(("low.head", "target"))}
    units = dict(proprio_mean=used[0].mean(0), proprio_scale=used[0].std(0) + 1e-3, target_mean=mean, target_scale=scale)
    agent.load_state_dict(kept | {k: torch.from_numpy(v) for k, v in units.items()}, strict=False)       # the head begins anew
    [module.requires_grad_(False) for module in (agent.high, agent.high_text) if pretrained and module is not None]
    old = [p.detach().cpu().numpy().ravel() for p in pretrained.parameters()] if pretrained else []
    own = argparse.Namespace(**vars(args) | dict(lr=args.finetune_lr if pretrained else args.lr))
    own.data_checksum = fingerprint(*used, *old, *(part.target for part in labels if args.variant.endswith("decoded")))
    objective = lambda images, tokens, proprio, target, mask, _: dict(action=l1(agent(images, tokens, proprio), target, mask))
    return agent, name, *train(agent, labels, own, Path(args.out, f"{name}.pt"), "policy", device, objective)
def regression(x, y, alpha=0.03):
    """Kernel ridge regression (N, D) -> (N, A), twice: the second kernel measures distance along the gradients of the first fit, for each
    number of y its own, so that what does not matter to it no longer counts (recursive feature machines, Radhakrishnan et al. 2024)."""
    fit = lambda x, y: kernel_ridge.KernelRidge(kernel="rbf", gamma=1.2 / max(x.var(0).sum(), 1e-12), alpha=alpha).fit(x, y)
    kernel = metrics.pairwise.rbf_kernel(x, gamma=(first := fit(x, y)).gamma)
    gradients = ((kernel @ c)[:, None] * x - (kernel * c) @ x for c in first.dual_coef_.T)             # (N, D) each, but for a factor
    parts = [np.linalg.qr(g, mode="r").T for g in gradients]                                           # |(a - b) part| = |g (a - b)|
    models = [(part, fit(x @ part, target)) for part, target in zip(parts, y.T)]
    return lambda x: np.stack([model.predict(x @ part) for part, model in models], 1)
def decoded(args, sets, labels):
    """The demonstrations in labels and the video as Labels, its actions read by regression, fitted on the demonstrations, from latents k
    before to k after, for every k of stage 1, and proprio where all have it. (In VPT, Baker et al. 2022, an IDM reads that saw actions.)"""
    around, robots, gaps = {}, all(s.proprio is not None for s in sets), [args.gap, *(args.shorter or [])]
    inputs = [[load_latents(s, args.out, k if k != args.gap else "") for s in sets] for k in gaps]
    inputs.append([s.proprio if robots else np.zeros((s.total, 1)) for s in sets])
    scaled = [standardise(x, [s.rows(s.split("train"), k) for s in sets])[0] for x, k in zip(inputs, gaps + [args.gap])]
    for s, *z, body in zip(sets, *scaled):                                       # around (T, 5 D a k + P); an episode's ends repeat
        ends = lambda k: (np.repeat(x, s.length)[:, None] for x in (s.start, s.start + np.maximum(s.length - 1 - k, 0)))
        at = lambda k: np.clip(np.arange(s.total)[:, None] + np.arange(-2, 3) * k // 2, *ends(k))
        z = np.concatenate([x[at(k)].reshape(s.total, -1) for x, k in zip(z, gaps)], 1)
        around[s.name] = np.concatenate([z, 0.5 * body * (z.shape[1] / body.shape[1]) ** 0.5], 1)      # proprio: a fifth of the variance
    x, y = (np.concatenate(c) for c in zip(*[(around[part.dataset.name][part.rows], part.target[part.rows]) for part in labels]))
    pick = np.random.default_rng(args.seed).permutation(len(x))[:10_000]         # time is cubic in their number
    read = regression(x[pick], y[pick])
    for s in (s for s in sets if s.name in (args.video or [s.name])):
        target = np.concatenate([read(part) for part in np.array_split(around[s.name], 1 + s.total // 4096)]).clip(-1, 1).astype(np.float32)
        for part in (part for part in labels if part.dataset is s):              # where the truth is known, it stands
            target[part.rows] = part.target[part.rows]
        labels = [part for part in labels if part.dataset is not s] + [Labels(s, s.split("train"), target, t5=args.text)]
    return labels
def data_shape(sets):
    """What the models must know of the data: frame size, cameras, width of proprio."""
    width, cameras = max([1, *(s.proprio.shape[1] for s in sets if s.proprio is not None)]), 1 + any(s.wrist is not None for s in sets)
    return dict(size=sets[0].frames.shape[1], cameras=cameras, high_cameras=cameras, proprio=width)
def load_agent(out, variant, demos, device):
    """The fine-tuned policy of a run folder, ready to act."""
    record = load_checkpoint(path := Path(out, f"policy_{variant}_{demos}.pt"), "policy")
    load_weights(agent := Agent(record["shape"], argparse.Namespace(**dict(text=None) | record["args"])), record, path)
    return agent.to(device).eval()
def held_out(agents, sets, args):
    """On held-out demonstrations: L1 error of the first predicted action over that of predicting the mean; how often, of the skills of the
    episode, the true one is nearest to pi_h's, and how often by chance. Draws actions and skills of one demonstration."""
    dataset = [s for s in sets if s.actions is not None][0]
    levels, width = {n: pair[0] for n, (_, pair) in agents.items() if None not in pair}, dataset.actions.shape[1]
    figure, figures, phase = Figure((9, 1.3 * (width + len(levels))), layout="constrained"), {}, dataset.truth("phase")
    axes, first = figure.subplots(width + len(levels), sharex=True), dataset.split("val")[0]
    for name, (agent, _) in agents.items():
        wrong, known, skills = np.zeros(2), [], load_stage(dataset, args.out, levels[name], args.control) if name in levels else None
        for e in dataset.split("val")[:20]:
            rows = dataset.rows([e])
            seen = (None if array is None else array[rows] for array in (dataset.frames, dataset.wrist, dataset.proprio))
            (out, skill), true = agent.eval().act(*seen, [dataset.episodes[e]["text"]] * len(rows)), dataset.actions[rows]
            wrong += np.abs(out[:, 0] - true).sum(), np.abs(true - true.mean(0)).sum()
            [axes[d].plot(out[:, 0, d], label=name) for d in range(width) if e == first]
            if name in levels:                                                   # number the episode's skills in order of time
                _, begin, which = np.unique(skills[rows], axis=0, return_index=True, return_inverse=True)
                which, near = np.argsort(np.argsort(begin))[which], metrics.pairwise_distances_argmin(skill, skills[rows[np.sort(begin)]])
                known.append((np.mean(near == which), 1 / len(begin)))
                if e == first:
                    axis = axes[width + list(levels).index(name)]
                    phase is None or axis.pcolorfast([0, len(rows)], [0, len(begin)], phase[rows][None], cmap="Pastel1")
                    axis.step(range(len(rows)), np.stack([which, near], 1), label=["skill", f"pi_h's, {name}"]), axis.legend(fontsize=7)
        figures[name] = dict(action_error=wrong[0] / wrong[1]) | dict(zip(("skill_accuracy", "skill_chance"), np.mean(known or [[]], 0)))
    for d, line in enumerate(dataset.actions[dataset.rows([first])].T):
        axes[d].plot(line, "k", label="demonstration"), axes[d].set_ylabel(f"action {d}")
    axes[0].legend(fontsize=7), write(Path(args.out, "policy.png"), argparse.Namespace(save=figure.savefig))
    return figures
def main():
    args = get_args()
    device, sets, pretrained, agents, report = setup(args, "layers"), open_sets(args.data), {}, {}, Path(args.out, "policy.json")
    figures = json.loads(report.read_text()) if report.exists() else dict(losses={}, seconds={}, held_out={})
    def note(agent, name, losses, seconds):                                      # losses are empty when nothing was left to train
        losses and [figures[key].update({name: value}) for key, value in (("losses", losses), ("seconds", seconds))]
        return write(report, figures) or agent
    first = load_checkpoint(lam, "lam")["args"] if (lam := Path(args.out, "lam.pt")).exists() else {}
    args.gap, args.shorter = first.get("gap", 0), first.get("shorter")
    for variant, demos in itertools.product(args.variant, args.demos):
        control = None if None in (pair := VARIANTS[variant]) else args.control
        unused = dict.fromkeys("video pretrain_steps finetune_lr gap shorter".split() if pair[1] is None else ())
        own = argparse.Namespace(**vars(args) | dict(variant=variant, demos=demos, control=control) | unused)
        own.suffix = "".join(f"_{x}" for x in (*sorted({*(own.video or [])}), own.control) if x)
        if pair[1] is not None and pair not in pretrained:
            torch.manual_seed(args.seed)
            pretrained[pair] = note(*pretrain(own, sets, *pair, device))
        agents[f"{variant}{own.suffix} {demos}"] = note(*finetune(own, sets, pretrained.get(pair), device)), pair
    figures["held_out"].update(found := held_out(agents, sets, args)), write(report, figures)
    [print(f"held-out demonstrations, {name}: " + "  ".join(f"{k} {v:.3f}" for k, v in row.items())) for name, row in found.items()]

if __name__ == "__main__":
    main()
