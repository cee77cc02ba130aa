"""
Stage 4, evaluation: success rates of policies, in the toy world or in LIBERO, through one loop.

LIBERO's protocol, as OpenVLA-OFT and LeRobot run it: an episode starts from one of the benchmark's
fixed states, rests 10 steps so that objects fall into place, and succeeds when the environment says
so. The policy decides at every step in the toy world, at every eighth in LIBERO.

    python eval_libero.py                            # toy world: HiLAM and flat, 100 episodes each
    python eval_libero.py --suite libero_object --out out/libero_object --variant hilam --demos 5
    python eval_libero.py --suite libero_object --replay DATASETS/libero_object --out out/replay

Writes OUT/eval_SUITE_NAME_DEMOS.jsonl, a line an episode, from which a killed evaluation goes on;
the same .json, with success by task; a GIF of each task's first success and first failure; and
OUT/eval_SUITE.png, success with Wilson's intervals. --tasks, --prompt, --replay join the names.
"""

import functools
import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
from concurrent.futures import as_completed
from contextlib import redirect_stdout
from ctypes.util import find_library
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from matplotlib.figure import Figure
from natsort import natsorted
from pebble import ProcessPool
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

import data
from data import COUNT, GOALS, REAL, SEED, TASKS, fail, number, write
from policy import VARIANTS, amount, load_agent
from skills import read_skills

LIMITS = {"toy": 120, "libero_spatial": 220, "libero_object": 280}
LIMITS |= {"libero_goal": 300, "libero_10": 520}  # the most steps of an episode
SETTLE = 10  # steps of rest before the policy acts: objects fall into place
TIMEOUT = 1800  # seconds for an episode: LIBERO's reset tries again for ever when it fails
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")  # frames, wrist
load_once = functools.cache(load_agent)  # a worker loads a policy once, not for each episode


def get_args():
    parser = data.make_parser(__doc__)
    add = parser.add_argument
    add("--suite", choices=LIMITS, default="toy", help="the world to evaluate in")
    add("--variant", nargs="+", default=["hilam", "flat"], help="NAMEs in policy_NAME_DEMOS.pt")
    add("--demos", type=amount, nargs="+", default=[0.1], help="what policy.py had as --demos")
    add("--out", type=os.path.realpath, nargs="+", default=["out/toy"], help="run folders, pooled")
    add("--episodes", type=COUNT, default=10, help="episodes a task")
    add("--tasks", type=number(int, 0, 9), nargs="+", help="of the suite's ten, in order of names")
    add("--max-steps", type=COUNT, help="steps of an episode, if not the suite's")
    add("--clear", type=REAL, default=0.5, help="LIBERO: grip commands within +-this are ignored")
    add("--workers", type=COUNT, default=2, help="LIBERO: simulators, a process each")
    add("--prompt", choices=["video", "other"], help="toy: a video, not a text, tells the task")
    add("--replay", metavar="DIR", help="LIBERO: play the demonstrations of DIR's HDF5 files")
    add("--seed", type=SEED, default=0, help="of the environments")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    args = parser.parse_args()
    args.max_steps = args.max_steps or LIMITS[args.suite]
    return args


# -------------------------------------------------------------------------------------- the loop
def ensemble(past, chunk, execute):
    """Temporal aggregation (ACT, BAKU): several decisions predicted an action for the same step;
    their mean is taken, weighted by exp(0.01 age), age: how many steps ago the decision was made.
    chunk (B, n, A): what is predicted now for the next n steps. past (B, n, A + 1): for the same
    steps the weighted sum of the earlier predictions and, as last number, of their weights; zeros
    at first. Returns the next actions (B, execute, A), and past for the next decision."""
    total = past + np.insert(chunk, chunk.shape[-1], 1, axis=-1)  # predicted now: weight 1
    mean = total[:, :, :-1] / total[:, :, -1:]
    later = np.pad(total[:, execute:], ((0, 0), (0, execute), (0, 0)))  # the steps still to come
    return mean[:, :execute], math.exp(0.01 * execute) * later  # older by then


def rollout(world, agent, execute):
    """Observe, decide, execute, until the last of a world's episodes has ended. As each ends,
    yields its number, success, steps, and the list of frames that the policy saw."""
    films = [[] for _ in world.alive]
    past = np.zeros((len(films), agent.settings["chunk"], agent.shape["target"] + 1))
    while world.alive.any():
        going = np.flatnonzero(world.alive)
        frames, *others = world.observe(going)
        chunk = agent.act(frames, *others)  # (B, n, A)
        actions, past[going] = ensemble(past[going], chunk, execute)
        world.execute(going, actions)
        for i, frame in zip(going, frames, strict=True):
            films[i].append(frame)
            if not world.alive[i]:
                yield i, bool(world.success[i]), int(world.steps[i]), films[i]


class ToyEpisodes:
    """Episodes of the toy world, all at once. jobs: a list of (task, episode)."""

    def __init__(self, jobs, args):
        self.goals = [TASKS[task] for task, _ in jobs]
        if args.prompt:  # one after another of all 48; robots were shown 10
            self.goals = [GOALS[(5 * task + episode) % len(GOALS)] for task, episode in jobs]
        self.seeds = [[7_000_000 + args.seed, *job] for job in jobs]
        self.world = data.ToyWorld(self.goals, self.seeds)
        self.prompts = None  # or of each episode and step the skill of its video's frame
        self.limit = args.max_steps
        self.alive = np.ones(len(jobs), bool)
        self.success = np.zeros(len(jobs), bool)
        self.steps = np.zeros(len(jobs), int)

    def observe(self, going):
        """Of these episodes the arguments of Agent.act: frames, wrist (None here), proprio, texts,
        skill (None: pi_h's)."""
        texts = [data.toy_text(self.goals[i]) for i in going]
        skill = None if self.prompts is None else self.prompts[going, self.steps[going]]
        return self.world.frames(going), None, self.world.hand[going], texts, skill

    def execute(self, going, actions):
        """Take n steps in these episodes, actions (B, n, A)."""
        for n in range(actions.shape[1]):
            every = np.zeros((len(self.goals), actions.shape[2]))
            every[going] = actions[:, n]
            done = self.world.step(every)
            self.steps += self.alive
            self.success |= self.alive & done
            self.alive &= ~done & (self.steps < self.limit)


def read_prompts(episodes, goals, out, agent, device):
    """The skills that tell the task in place of a sentence, (B, limit, D): at [i, t] that of frame
    t of a video in which a hand reaches goals[i] on the table of episode i."""
    stage = VARIANTS[agent.settings["variant"]][0]
    pairs = zip(goals, episodes.seeds, strict=True)
    films = [data.toy_demonstrate("hand", goal, seed) for goal, seed in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/videos"
        data.pack(path, [("", "", "train", {"frames": film["frames"]}) for film in films])
        video = data.Packed(path)
        hand = data.open_sets(data.TOY_SETS)[0]
        skills = read_skills(out, video, hand, stage, device)
    frame = np.minimum(np.arange(episodes.limit), video.length[:, None] - 1)  # then its last one
    return skills[video.start[:, None] + frame]


# ------------------------------------------------------------- LIBERO's simulators, a process each
def prepare_libero(folder):
    """Choose a renderer, fetch the assets, and write the configuration that LIBERO would ask for on
    the keyboard into this folder: the one in the home folder may be of another LIBERO."""
    if not (find_spec("libero") and find_spec("robosuite")):
        install = "pip install --no-deps libero==0.1.1 bddl==1.0.1"
        fail(f"LIBERO is not installed: pip install -r requirements.txt && {install}")
    renderer = os.environ.setdefault("MUJOCO_GL", "egl" if find_library("EGL") else "osmesa")
    library = {"egl": "EGL", "osmesa": "OSMesa"}.get(renderer)
    if library and not find_library(library):
        fail(f"no {library} here: apt-get install libegl1 libgl1-mesa-dri libosmesa6")
    root = Path(find_spec("libero").submodule_search_locations[0], "libero")
    paths = f"bddl_files: {root / 'bddl_files'}\ninit_states: {root / 'init_files'}\n"
    Path(folder, "config.yaml").write_text(paths)
    os.environ["LIBERO_CONFIG_PATH"] = str(folder)
    from libero.libero import get_assets_path

    if not Path(get_assets_path()).exists():  # LIBERO has just tried to download them
        fail(f"no assets: `pip install huggingface_hub`, or put LIBERO's into {root / 'assets'}")


def set_demonstration(env, path, index):
    """Bring the simulator to a demonstration's first state, with the fixtures where its model has
    them, and return its actions (T, 7)."""
    import h5py

    with h5py.File(path) as file:
        names = natsorted(file["data"])
        if index >= len(names):
            raise ValueError(f"{path} holds {len(names)} demonstrations: --episodes {len(names)}")
        demo = file["data"][names[index]]
        model = env.env.sim.model
        scene = ElementTree.fromstring(demo.attrs["model_file"]).find("worldbody")
        for body in scene.findall("body"):
            if body.get("name") in model.body_names:
                i = model.body_name2id(body.get("name"))
                model.body_pos[i] = [float(x) for x in body.get("pos", "0 0 0").split()]
                model.body_quat[i] = [float(x) for x in body.get("quat", "1 0 0 0").split()]
        env.set_init_state(demo["states"][0])
        return demo["actions"][:]


class LiberoEpisode:
    """An episode in LIBERO's simulator, which rollout plays as it plays ToyEpisodes; size: of the
    images. It begins with the seed, a reset and the fixed state, in this order, and rest."""

    def __init__(self, task, episode, args, size):
        from libero.libero.benchmark import get_benchmark
        from libero.libero.envs import OffScreenRenderEnv

        suite = get_benchmark(args.suite)()
        names = suite.get_task_names()
        name = natsorted(names)[task]  # as policy.py numbers all ten
        index = names.index(name)  # LIBERO's own number
        bddl = suite.get_task_bddl_file_path(index)
        self.env = OffScreenRenderEnv(bddl_file_name=bddl, horizon=10**9)  # we count its steps
        self.args = args
        self.size = size
        self.grip = -1.0  # the hand is open
        self.alive = np.array([True])
        self.steps = np.array([0])
        self.env.seed(args.seed)
        self.env.reset()
        if args.replay:
            path = Path(args.replay, f"{name}_demo.hdf5")
            self.demonstration = set_demonstration(self.env, path, episode)
        else:
            self.env.set_init_state(suite.get_task_init_states(index)[episode])
            self.step([[0, 0, 0, 0, 0, 0, self.grip]] * SETTLE)
            if self.success[0]:
                raise ValueError("it succeeds before the policy acts")

    def step(self, actions):
        """Take the steps actions (n, 7), as far as the first success; returns how many. Only for
        the last one the cameras are on."""
        for i, action in enumerate(actions):
            for name in CAMERAS:  # set_enabled() would blank the image and restart its clock
                self.env.env._observables[name]._enabled = i == len(actions) - 1
            self.observed, _, done, _ = self.env.step(action)
            if done:
                break
        self.success = np.array([bool(done)])
        return i + 1

    def observe(self, _):
        """The arguments of Agent.act; the sentence is the BDDL file's, as in the demonstrations."""
        images = [self.observed[name][::-1] for name in CAMERAS]  # rendered upside down
        frames, wrist = data.resize(images, self.size)
        joints, fingers = self.observed["robot0_joint_pos"], self.observed["robot0_gripper_qpos"]
        proprio = np.concatenate([joints, fingers])
        return frames[None], wrist[None], proprio[None], [self.env.language_instruction], None

    def execute(self, _, actions):
        """Take n steps, actions (1, n, 7), of which the last number is the gripper's command. It
        is held until one beyond +-clear: a hand that wavers near a grasp drops things."""
        actions = actions[0, : self.args.max_steps - self.steps[0]]
        for action in actions:
            if abs(action[-1]) > self.args.clear:
                self.grip = action[-1]
            action[-1] = self.grip
        self.steps += self.step(actions)
        self.alive = ~self.success & (self.steps < self.args.max_steps)


def play(task, episode, args, policy, execute, device):
    """Play an episode of LIBERO with a policy (the arguments of load_agent, but for the device) or,
    with --replay, its demonstration; returns success, steps, film. Runs in a worker."""
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    agent = None if args.replay else load_once(*policy, device)
    with redirect_stdout(None):  # LIBERO prints the order of its tasks
        scene = LiberoEpisode(task, episode, args, agent and agent.shape["size"])
    if agent:
        [(_, *outcome)] = rollout(scene, agent, execute)
    else:
        steps = scene.step(scene.demonstration)
        outcome = [bool(scene.success[0]), steps, []]
    scene.env.close()
    return outcome


def play_libero(jobs, workers, *settings):
    """Play jobs, (task, episode), in so many workers with these settings. Yields of each, when it
    ends, its number, success, steps and film. What fails, dies or hangs is tried again, once."""
    pool = ProcessPool(workers, context=multiprocessing.get_context("spawn"))  # never by fork
    numbers = range(len(jobs))
    try:
        for attempt in (1, 2):
            # Ctrl-C is for this process, which ends the workers: they inherit that it is ignored
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
            running = {}  # {future: number}
            for i in numbers:
                running[pool.schedule(play, (*jobs[i], *settings), timeout=TIMEOUT)] = i
            signal.signal(signal.SIGINT, handler)
            numbers = []  # of what failed
            for future in as_completed(list(running)):
                i, error = running.pop(future), future.exception()
                if error is None:
                    yield i, *future.result()
                elif attempt == 1:
                    numbers.append(i)
                else:
                    task, episode = jobs[i]
                    problem = f"{type(error).__name__} {error}"
                    fail(f"task {task}, episode {episode}, tried twice: {problem}")
    finally:
        pool.stop()
        pool.join()


# ----------------------------------------------------------------------------------------- report
def rate(wins, episodes):
    """Success in so many of the episodes: its share and Wilson's 95 % interval, in a dict."""
    ci95 = binomtest(wins, episodes).proportion_ci(method="wilson")
    share, ci95 = round(wins / episodes, 4), [round(float(end), 4) for end in ci95]
    return {"success_rate": share, "ci95": ci95, "wins": wins, "episodes": episodes}


def save_film(path, film, pace):
    """Save frames (S, S, 3) as a GIF, enlarged, each shown for pace milliseconds."""
    images = [Image.fromarray(frame).resize((192, 192), Image.NEAREST) for frame in film]
    images[0].save(path, save_all=True, append_images=images[1:], duration=pace, loop=0)


def read_log(log, settings):
    """The lines of a log (.jsonl), and what they hold under these settings:
    {(task, episode): record}."""
    lines = log.read_text().splitlines() if log.exists() else []
    try:
        known = [json.loads(line) for line in lines]
        ours = [record for record in known if record["settings"] == settings]
        return lines, {(record["task"], record["episode"]): record for record in ours}
    except (ValueError, KeyError, TypeError) as error:
        fail(f"{log} is damaged ({error}): delete it")


def file_name(args, *words):
    """The name of an evaluation's files, or of all evaluations' picture."""
    how = [args.prompt, "replay" if args.replay else None]
    if args.tasks:
        how.append("tasks" + "-".join(map(str, args.tasks)))
    return "_".join(["eval", args.suite, *map(str, words), *filter(None, how)])


def evaluate(args, device, out, name, demos, agent):
    """Roll out a policy (None: a replay) in the episodes that its log lacks; returns a report."""
    toy = args.suite == "toy"
    stem = file_name(args, name, demos) if agent else file_name(args)
    execute = 1 if toy else 8  # steps between two decisions
    if agent:
        path = Path(out, f"policy_{name}_{demos}.pt")
        shape = {"size": data.TOY_SIZE, "proprio": 3, "target": 3}
        if not toy:
            shape = {"proprio": 9, "target": 7}
        if not shape.items() <= agent.shape.items():
            fail(f"{path} is of other data than --suite {args.suite}")
        source = data.file_checksum(path)
        execute = min(execute, agent.settings["chunk"])
    else:
        files = Path(args.replay).glob("*_demo.hdf5")
        source = {file.name: data.file_checksum(file) for file in files}
    settings = {"suite": args.suite, "policy": source, "execute": execute, "limit": args.max_steps}
    settings |= {key: getattr(args, key) for key in ("seed", "clear", "replay", "prompt")}
    if not toy:
        settings |= {name: version(name) for name in ("libero", "robosuite", "mujoco")}
        settings["renderer"] = os.environ["MUJOCO_GL"]
    log = Path(out, f"{stem}.jsonl")
    data.claim(log)
    lines, records = read_log(log, settings)
    if not records:
        for film in Path(out).glob(f"{stem}_task[0-9]_*.gif"):  # of an older policy
            film.unlink()
    tasks = args.tasks or range(10)
    wanted = [(task, episode) for task in tasks for episode in range(args.episodes)]
    jobs = [job for job in wanted if job not in records]
    if toy:
        world = ToyEpisodes(jobs, args)
        if args.prompt and jobs:
            shift = int(args.prompt == "other")  # a control: another goal on the same table
            goals = [GOALS[GOALS.index(goal) - shift] for goal in world.goals]
            world.prompts = read_prompts(world, goals, out, agent, device)
        played = rollout(world, agent.to(device), execute)
    else:
        played = play_libero(jobs, args.workers, args, (out, name, demos), execute, device)
    for i, success, steps, film in tqdm(played, f"{args.suite} {name}", len(jobs), disable=None):
        task, episode = jobs[i]
        outcome = "success" if success else "failure"
        seen = {(record["task"], record["success"]) for record in records.values()}
        if film and (task, success) not in seen:
            save_film(Path(out, f"{stem}_task{task}_{outcome}.gif"), film, 100 if toy else 300)
        record = {"task": task, "episode": episode, "success": success, "steps": steps}
        records[task, episode] = record | {"settings": settings}
        lines.append(json.dumps(records[task, episode]))
        write(log, "\n".join(lines) + "\n")
    won = [task for task, episode in wanted if records[task, episode]["success"]]
    report = {"variant": name, "demos": demos} | rate(len(won), len(wanted))
    report["per_task"] = {str(task): rate(won.count(task), args.episodes) for task in tasks}
    write(Path(out, f"{stem}.json"), report | {"settings": settings})
    return report


def summarise(reports, suite, path):
    """Print and draw success by policy and number of demonstrations, pooled over run folders."""
    print(f"\n{'policy':24} {'demos':>6} {'success':>8}   95 % interval   episodes   by run folder")
    figure = Figure((5, 3.2), dpi=200, layout="constrained")
    axis = figure.subplots()
    cells = {}  # {policy: {demonstrations: the reports of all run folders}}
    for report in reports:
        row = cells.setdefault(report["variant"], {})
        row.setdefault(str(report["demos"]), []).append(report)  # 1 demonstration is not 1.0, all
    for i, (name, row) in enumerate(cells.items()):
        points = []  # success, and its interval's ends
        for demos, runs in row.items():
            pooled = rate(sum(run["wins"] for run in runs), sum(run["episodes"] for run in runs))
            points.append([pooled["success_rate"], *pooled["ci95"]])
            figures = "{:8.2f}   [{:.2f}, {:.2f}]".format(*points[-1])
            each = " ".join(f"{run['success_rate']:.2f}" for run in runs)
            print(f"{name:24} {demos:>6} {figures}    {pooled['episodes']:8d}   {each}")
        share, low, high = np.transpose(points)
        x = np.arange(len(row)) + 0.04 * i  # side by side, so that no interval hides another
        axis.errorbar(x, share, [share - low, high - share], marker="o", capsize=4, label=name)
        axis.set_xticks(range(len(row)), list(row))
    axis.set(xlabel="labelled demonstrations a task", ylabel=f"success, {suite}", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    write(path, figure)


def main():
    args = get_args()
    device, _, _ = data.start(args.device)
    for key in ("out", "variant", "demos", "tasks"):  # what is named twice is no second evidence
        setattr(args, key, list({str(x): x for x in getattr(args, key) or []}.values()))
    if args.replay:
        if args.suite == "toy" or args.prompt or not list(Path(args.replay).glob("*_demo.hdf5")):
            fail(f"--replay {args.replay}: for LIBERO's suites, a folder of *_demo.hdf5 files")
        runs = [(out, "replay", 0, None) for out in args.out]
    else:  # all policies are there before the first one starts
        runs = [(o, name, d) for o in args.out for d in args.demos for name in args.variant]
        runs = [(*run, load_agent(*run, "cpu")) for run in runs]
        for out, name, _, agent in runs if args.prompt else []:
            if args.suite != "toy" or agent.settings["low_text"]:
                fail("--prompt: for the toy world, and policies that are told the skill alone")
            if data.file_checksum(Path(out, "skills.pt")) != agent.settings.get("skills"):
                fail(f"{name} has not learned the skills of {out}/skills.pt")
    with tempfile.TemporaryDirectory() as folder:
        if args.suite != "toy":
            if args.episodes > 50:
                fail(f"--episodes {args.episodes}: LIBERO has 50 initial states a task")
            prepare_libero(folder)
        reports = [evaluate(args, device, *run) for run in runs]
    summarise(reports, args.suite, Path(args.out[0], f"{file_name(args)}.png"))


if __name__ == "__main__":
    main()
