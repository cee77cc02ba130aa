"""
Stage 4, evaluation: success rates of policies, in the toy world or in LIBERO, through one loop.

LIBERO's protocol, as OpenVLA-OFT and LeRobot run it: an episode starts from one of the benchmark's
fixed states, rests 10 steps so that objects fall into place, and succeeds when the environment says
so. The policy decides every --execute steps, for all simulators that wait for it as one batch.

    python eval_libero.py                            # toy world: HiLAM and flat, 100 episodes each
    python eval_libero.py --suite libero_object --out out/libero_object --variant hilam --demos 5
    python eval_libero.py --suite libero_object --replay DATASETS/libero_object --out out/replay

Adds a line an episode to OUT/eval_SUITE_NAME_DEMOS.jsonl, from which a killed evaluation goes on.
Writes OUT/eval_SUITE_NAME_DEMOS.json, a GIF of each task's first success and first failure, and
OUT/eval_SUITE.png, success over demonstrations with Wilson's 95 % intervals.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import tempfile
import zlib
from contextlib import suppress
from ctypes.util import find_library
from importlib.metadata import version
from importlib.util import find_spec
from itertools import groupby
from multiprocessing.connection import wait
from operator import itemgetter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

import data
from data import COUNT, GOALS, REAL, SEED, TASKS, fail, number, write
from policy import VARIANTS, amount, load_agent
from skills import read_skills

LIMITS = {"toy": data.TOY_LIMIT, "libero_spatial": 220, "libero_object": 280}
LIMITS |= {"libero_goal": 300, "libero_10": 520}  # the most steps of an episode
SETTLE = 10  # steps of rest before the policy acts: objects fall into place
TIMEOUT = 900  # seconds: LIBERO's reset tries again for ever when it fails
CAMERAS = ("agentview_image", "robot0_eye_in_hand_image")  # frames, wrist


def get_args():
    parser = data.make_parser(__doc__)
    add = parser.add_argument
    add("--suite", choices=LIMITS, default="toy", help="the world to evaluate in")
    add("--variant", nargs="+", default=["hilam", "flat"], help="NAMEs in policy_NAME_DEMOS.pt")
    add("--demos", type=amount, nargs="+", default=[0.1], help="what policy.py had as --demos")
    add("--out", nargs="+", default=["out/toy"], help="run folders; several (seeds) are pooled")
    add("--episodes", type=COUNT, default=10, help="episodes a task")
    add("--tasks", type=number(int, 0, 9), nargs="+", default=range(10), help="sorted by name")
    add("--execute", type=COUNT, help="steps between two decisions, if not 1 (toy) or 8 (LIBERO)")
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


# ------------------------------------------------------------ the toy world as a pool of simulators
class ToyPool:
    """All episodes at once. jobs: a list of (task, episode), called by their places in it."""

    def __init__(self, jobs, args, size):
        self.goals = [TASKS[task] for task, _ in jobs]
        if args.prompt:  # all 48 goals, of which the robot was shown 10
            self.goals = [GOALS[(5 * task + episode) % len(GOALS)] for task, episode in jobs]
        self.seeds = [[7_000_000 + args.seed, *job] for job in jobs]
        self.world = data.ToyWorld(self.goals, self.seeds, size=size)
        self.prompts = None  # or for each job its video's skills, (T, D)
        self.alive = np.ones(len(jobs), bool)
        self.limit = args.max_steps
        self.steps = 0

    def observe(self):
        """The jobs that wait for a decision (B,), and for them the arguments of Agent.act: frames,
        wrist (None here), proprio, texts, skill."""
        waiting = np.flatnonzero(self.alive)
        texts = [data.toy_text(self.goals[job]) for job in waiting]
        skill = None
        if self.prompts:  # at step t the skill of the video's frame t
            told = [self.prompts[job] for job in waiting]
            skill = np.stack([skills[min(self.steps, len(skills) - 1)] for skills in told])
        proprio = self.world.proprio()[waiting]
        return waiting, self.world.frames(waiting), None, proprio, texts, skill

    def execute(self, waiting, actions):
        """Take n steps, actions (B, n, A); returns a list of (job, success, steps) that ended."""
        ended = []
        for action in np.stack(actions, axis=1):  # (B, A), one step
            every = np.zeros((len(self.goals), action.shape[1]))
            every[waiting] = action
            success = self.world.step(every)
            self.steps += 1
            over = self.alive & (success | (self.steps >= self.limit))
            ended += [(job, bool(success[job]), self.steps) for job in np.flatnonzero(over)]
            self.alive &= ~over
        return ended


def read_prompts(pool, out, agent, device):
    """For each job the skills (T, D) of a video in which a hand does the job's task on its table:
    what tells the policy the task in place of a sentence."""
    stage = VARIANTS[agent.settings["variant"]][0]
    if stage is None:
        fail("--prompt: this policy is flat, it follows no skills")
    pairs = zip(pool.goals, pool.seeds, strict=True)
    films = [data.toy_demonstrate("hand", goal, seed, pool.world.size) for goal, seed in pairs]
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/videos"
        data.pack(path, [("", "", "train", {"frames": film["frames"]}) for film in films])
        video = data.Packed(path)
        hand = data.open_sets(data.TOY_SETS)[0]
        return np.split(read_skills(out, video, hand, stage, device), video.start[1:])


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


def set_demonstration(env, path, number):
    """Bring the simulator to a demonstration's first state, with the fixtures where its model has
    them, and return its actions (T, 7)."""
    import h5py

    with h5py.File(path) as file:
        names = sorted(file["data"], key=data.natural)
        if number >= len(names):
            raise ValueError(f"{path} holds {len(names)} demonstrations: --episodes {len(names)}")
        demo = file["data"][names[number]]
        model = env.env.sim.model
        scene = ElementTree.fromstring(demo.attrs["model_file"]).find("worldbody")
        for body in scene.findall("body"):
            if body.get("name") in model.body_names:
                i = model.body_name2id(body.get("name"))
                model.body_pos[i] = [float(x) for x in body.get("pos", "0 0 0").split()]
                model.body_quat[i] = [float(x) for x in body.get("quat", "1 0 0 0").split()]
        env.set_init_state(demo["states"][0])
        return demo["actions"][:]


def keep_grip(actions, grip, clear):
    """Actions (n, A) with the gripper's command, their last number, held at the last one beyond
    +-clear (at first grip): a hand that wavers near a grasp drops things."""
    actions = np.array(actions)
    for action in actions:
        grip = action[-1] if abs(action[-1]) > clear else grip
        action[-1] = grip
    return actions


class Simulator:
    """LIBERO's scene of one task, in a worker process; the policy is at the pipe's other end."""

    def __init__(self, suite, task, args, size, pipe):
        from libero.libero.envs import OffScreenRenderEnv

        names = suite.get_task_names()
        self.name = sorted(names, key=data.natural)[task]  # numbered as in policy.py
        index = names.index(self.name)  # LIBERO's own number
        self.states = suite.get_task_init_states(index)  # 50, fixed
        bddl = suite.get_task_bddl_file_path(index)
        self.env = OffScreenRenderEnv(bddl_file_name=bddl, horizon=10**9)  # we count its steps
        self.args = args
        self.size = size
        self.pipe = pipe

    def play(self, episode):
        """An episode: seed, reset, the fixed state, in this order, and rest; then what is seen is
        sent, and actions (n, 7) are received, to its end. Returns (success, steps)."""
        self.switch_cameras(True)
        self.env.seed(self.args.seed)
        self.env.reset()
        if self.args.replay:
            path = Path(self.args.replay, f"{self.name}_demo.hdf5")
            _, success, steps = self.run(set_demonstration(self.env, path, episode))
            return success, steps
        self.env.set_init_state(self.states[episode])
        still = [0, 0, 0, 0, 0, 0, -1.0]  # the hand is open
        observed, success, _ = self.run([still] * SETTLE)
        if success:
            raise ValueError("it succeeds before the policy acts")
        grip = -1.0
        steps = 0
        while not success and steps < self.args.max_steps:
            self.pipe.send(("sees", self.look(observed)))
            actions = self.pipe.recv()[: self.args.max_steps - steps]
            actions = keep_grip(actions, grip, self.args.clear)
            grip = actions[-1, -1]
            observed, success, taken = self.run(actions)
            steps += taken
        return success, steps

    def run(self, actions):
        """Step until success or the last action, for which alone the cameras are on. Returns the
        last observation, success and the steps taken."""
        signal.alarm(TIMEOUT)  # anew
        for i, action in enumerate(actions):
            self.switch_cameras(i == len(actions) - 1)
            observed, _, done, _ = self.env.step(action)
            if done:
                break
        return observed, bool(done), i + 1

    def switch_cameras(self, on):
        for name in CAMERAS:  # set_enabled() would blank the image and restart its clock
            self.env.env._observables[name]._enabled = on

    def look(self, observed):
        """What the policy sees: frames, wrist (S, S, 3), proprio (9,), and the sentence, which is
        the BDDL file's, as in the demonstrations."""
        frames, wrist = data.resize([observed[name] for name in CAMERAS], self.size)
        body = [observed["robot0_joint_pos"], observed["robot0_gripper_qpos"]]
        return frames, wrist, np.concatenate(body), self.env.language_instruction


def worker(pipe, jobs, args, size):
    """A process that plays jobs, (task, episode), and sends each one's outcome, or what went wrong,
    which ends it, as does the end of the process at the pipe's other end."""
    signal.alarm(TIMEOUT)  # ends this process, unless it is set anew in time
    logging.disable(logging.WARNING)
    try:
        from libero.libero.benchmark import get_benchmark

        suite = get_benchmark(args.suite)()
        for task, episodes in groupby(jobs, itemgetter(0)):  # a scene is slow to build
            simulator = Simulator(suite, task, args, size, pipe)
            for _, episode in episodes:
                pipe.send(("ended", simulator.play(episode)))
            simulator.env.close()
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
        with suppress(OSError):  # where nobody listens any more
            pipe.send(("failed", f"{type(error).__name__}: {problem}"))
    os._exit(0)  # skips the simulator's noisy destructors


class LiberoPool:
    """ToyPool's interface over --workers processes, spawned: a simulator must not be forked."""

    def __init__(self, jobs, args, size):
        self.jobs = jobs
        self.args = args
        self.size = size
        self.left = {}  # {pipe: jobs of the worker at its other end, of which it plays the first}
        self.seen = {}  # {job: (pipe, observation)} of those that wait for a decision
        self.repeated = set()  # jobs whose worker died
        for first in range(min(args.workers, len(jobs))):
            self.start(list(range(first, len(jobs), args.workers)))

    def start(self, left):
        """Start a worker with these jobs."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        jobs = [self.jobs[job] for job in left]
        process = context.Process(target=worker, args=(theirs, jobs, self.args, self.size))
        process.daemon = True
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a child inherits it
        process.start()
        signal.signal(signal.SIGINT, handler)  # Ctrl-C is for this process, which ends the others
        self.left[pipe] = left

    def observe(self):
        """As ToyPool's, of the workers that wait: perhaps none."""
        if not self.seen:
            return [], []
        looks = [look for _, look in self.seen.values()]
        frames, wrist, proprio, texts = map(list, zip(*looks, strict=True))
        return list(self.seen), np.stack(frames), np.stack(wrist), np.stack(proprio), texts, None

    def execute(self, waiting, actions):
        """As ToyPool's; then waits for a worker or more. A job whose worker fails, dies or hangs
        begins again, once, with another worker; it is returned as (job, None, 0)."""
        for job, chunk in zip(waiting, actions, strict=True):
            pipe, _ = self.seen.pop(job)
            with suppress(OSError):  # a worker that has died is noticed below
                pipe.send(chunk)
        ended = []
        for pipe in wait(list(self.left)):
            job = self.left[pipe][0]
            try:
                kind, content = pipe.recv()
            except (EOFError, OSError):
                kind, content = "failed", f"the simulator died, or hung for {TIMEOUT} s"
            if kind == "sees":
                self.seen[job] = (pipe, content)
            elif kind == "ended":
                ended.append((job, *content))
                self.left[pipe].pop(0)
                if not self.left[pipe]:
                    del self.left[pipe]
            else:
                task, episode = self.jobs[job]
                if job in self.repeated:
                    fail(f"task {task}, episode {episode}: {content}; start again to go on")
                self.repeated.add(job)
                self.start(self.left.pop(pipe))
                ended.append((job, None, 0))
        return ended


# --------------------------------------------------------------------------------------- rollouts
def ensemble(past, chunk, execute):
    """Temporal aggregation: a step's action is the mean of all chunks that predicted it, weighted
    by exp(-0.01 i), i counted from the oldest (ACT, BAKU). chunk (n, A): predicted now; past: sums
    of what was predicted before and of its weights, (n, A + 1), at first 0. Returns the actions
    (execute, A) and past for the next decision."""
    total = past + np.hstack([chunk, np.ones((len(chunk), 1))])  # the newest chunk has weight 1
    actions = total[:execute, :-1] / total[:execute, -1:]
    later = np.vstack([total[execute:], 0 * total[:execute]])
    return actions, math.exp(0.01 * execute) * later  # one that is older then weighs more


def rate(wins, episodes):
    """Success in so many of the episodes: its share and Wilson's 95 % interval, in a dict."""
    low, high = binomtest(wins, episodes).proportion_ci(method="wilson")
    share, ci95 = round(wins / episodes, 4), [round(float(low), 4), round(float(high), 4)]
    return {"success_rate": share, "ci95": ci95, "wins": wins, "episodes": episodes}


def save_film(path, film, upside_down):
    """Save frames (S, S, 3) as a GIF, enlarged."""
    flip = -1 if upside_down else 1
    images = [Image.fromarray(frame[::flip]).resize((192, 192), Image.NEAREST) for frame in film]
    pace = 300 if upside_down else 100  # milliseconds; LIBERO is seen every 8 steps
    images[0].save(path, save_all=True, append_images=images[1:], duration=pace, loop=0)


def read_log(log, settings):
    """The lines of a log (.jsonl), but for a last one that was cut off, and what they hold under
    these settings: {(task, episode): record}."""
    lines = log.read_text().split("\n")[:-1] if log.exists() else []
    records = {}
    for line in lines:
        try:
            record = json.loads(line)
            if record.pop("settings") == settings:
                records[record["task"], record["episode"]] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            fail(f"{log} is damaged: delete it, or its line {line[:40]!r}")
    return lines, records


def run_episodes(jobs, pool, agent, execute):
    """The rollout loop: observe, decide, execute. Yields ((task, episode), success, steps, film) of
    each job when it ends; film: the frames that the policy saw."""
    past = dict.fromkeys(range(len(jobs)), 0)  # what was predicted for each job's next steps
    films = {job: [] for job in range(len(jobs))}
    while films:
        waiting, frames, *rest = pool.observe()
        chunks = agent.act(frames, *rest) if len(waiting) else []
        actions = []
        for job, frame, chunk in zip(waiting, frames, chunks, strict=True):
            films[job].append(frame)
            chosen, past[job] = ensemble(past[job], chunk, execute)
            actions.append(chosen)
        for job, success, steps in pool.execute(waiting, actions):
            if success is None:  # it begins again
                past[job] = 0
                films[job] = []
            else:
                yield jobs[job], success, steps, films.pop(job)


def evaluate(args, out, name, demos, agent):
    """Roll out a policy (None: a replay) in the episodes that its log lacks; returns a report."""
    device, _, _ = data.start(out, args.device)
    toy = args.suite == "toy"
    stem = f"eval_{args.suite}_{name}_{demos}"
    if args.prompt:
        stem += f"_{args.prompt}"
    execute = args.execute or (1 if toy else 8)
    if args.replay:
        files = sorted(Path(args.replay).glob("*_demo.hdf5"))
        source = {file.name: file.stat().st_mtime for file in files}
        size = None
    else:
        path = Path(out, f"policy_{name}_{demos}.pt")
        if agent.shape["proprio"] != (3 if toy else 9):
            fail(f"{path} is of other data than --suite {args.suite}")
        source = zlib.crc32(path.read_bytes())
        size = agent.shape["size"]
        execute = min(execute, agent.low.chunk)
        agent.to(device)
    settings = {"suite": args.suite, "policy": source, "execute": execute, "limit": args.max_steps}
    settings |= {key: getattr(args, key) for key in ("seed", "clear", "replay", "prompt")}
    settings["settle"] = SETTLE
    if not toy:
        settings |= {name: version(name) for name in ("libero", "robosuite", "mujoco")}
        settings["renderer"] = os.environ["MUJOCO_GL"]
    log = Path(out, f"{stem}.jsonl")
    data.claim(log)
    lines, records = read_log(log, settings)
    if not records:
        for film in Path(out).glob(f"{stem}_task*.gif"):  # those of an older policy
            film.unlink()
    wanted = [(task, episode) for task in args.tasks for episode in range(args.episodes)]
    jobs = [job for job in wanted if job not in records]
    if toy:
        pool = ToyPool(jobs, args, size)
        if args.prompt and jobs:  # other, a control: the video of the next episode's table
            shown = [(task, episode + (args.prompt == "other")) for task, episode in jobs]
            pool.prompts = read_prompts(ToyPool(shown, args, size), out, agent, device)
    else:
        pool = LiberoPool(jobs, args, size)
    ended = run_episodes(jobs, pool, agent, execute)
    for job, success, steps, film in tqdm(ended, f"{args.suite} {name}", len(jobs), disable=None):
        outcome = "success" if success else "failure"
        seen = {(record["task"], record["success"]) for record in records.values()}
        if film and (job[0], success) not in seen:
            save_film(Path(out, f"{stem}_task{job[0]}_{outcome}.gif"), film, not toy)
        records[job] = {"task": job[0], "episode": job[1], "success": success, "steps": steps}
        lines.append(json.dumps(records[job] | {"settings": settings}))
        write(log, "\n".join(lines) + "\n")
    wins = dict.fromkeys(args.tasks, 0)
    for task, episode in wanted:
        wins[task] += records[task, episode]["success"]
    report = {"variant": name, "demos": demos} | rate(sum(wins.values()), len(wanted))
    report["per_task"] = {str(task): rate(n, args.episodes) for task, n in wins.items()}
    write(Path(out, f"{stem}.json"), report | {"settings": settings})
    return report


def summarise(reports, suite, path):
    """Print and draw success by policy and number of demonstrations, pooled over run folders."""
    print(f"\n{'policy':24} {'demos':>6} {'success':>8}   95 % interval   episodes   by run folder")
    figure = Figure((5, 3.2), dpi=200, layout="constrained")
    axis = figure.subplots()
    cells = {}  # {policy: {demonstrations: the reports of all run folders}}
    for report in reports:
        cells.setdefault(report["variant"], {}).setdefault(report["demos"], []).append(report)
    for i, (name, row) in enumerate(cells.items()):
        points = []  # success, its distance to the interval's lower and upper end
        for demos, runs in row.items():
            episodes = sum(run["episodes"] for run in runs)
            total = rate(sum(run["wins"] for run in runs), episodes)
            share, (low, high) = total["success_rate"], total["ci95"]
            points.append((share, share - low, high - share))
            figures = f"{share:8.2f}   [{low:.2f}, {high:.2f}]    {episodes:8d}"
            each = " ".join(f"{run['success_rate']:.2f}" for run in runs)
            print(f"{name:24} {demos:>6} {figures}   {each}")
        middle, below, above = np.transpose(points)
        x = np.arange(len(row)) + 0.04 * i  # side by side, so that no interval hides another
        axis.errorbar(x, middle, [below, above], marker="o", capsize=4, label=name)
        axis.set_xticks(range(len(row)), list(row))
    axis.set(xlabel="labelled demonstrations a task", ylabel=f"success, {suite}", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    write(path, figure)


def main():
    args = get_args()
    for key in ("variant", "demos", "out", "tasks"):  # what is named twice is no second evidence
        setattr(args, key, list(dict.fromkeys(getattr(args, key))))
    if args.replay:
        if args.suite == "toy" or not list(Path(args.replay).glob("*_demo.hdf5")):
            fail(f"--replay {args.replay}: for LIBERO's suites, a folder of *_demo.hdf5 files")
        runs = [(out, "replay", 0, None) for out in args.out]
    else:  # all policies are there before the first one starts
        runs = [(o, name, d) for o in args.out for d in args.demos for name in args.variant]
        runs = [(*run, load_agent(*run, "cpu")) for run in runs]
    with tempfile.TemporaryDirectory() as folder:
        if args.suite != "toy":
            if args.episodes > 50:
                fail(f"--episodes {args.episodes}: LIBERO has 50 initial states a task")
            prepare_libero(folder)
        reports = [evaluate(args, *run) for run in runs]
    summarise(reports, args.suite, Path(args.out[0], f"eval_{args.suite}.png"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: start the same command again to go on")
