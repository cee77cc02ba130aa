"""
Stage 4, evaluation: success rates of policies, in the toy world or in LIBERO, through one loop.

LIBERO's protocol, as OpenVLA-OFT and LeRobot run it: each episode starts from one of the
benchmark's fixed initial states, rests 10 steps so that objects fall into place, and is a success
as soon as the environment says so, within 220 / 280 / 300 / 520 steps (spatial / object / goal /
10). Simulators live in worker processes; the policy sees all that wait for it as one batch, and
cameras are rendered only when it decides, every --execute steps.

    python eval_libero.py                              # toy world: HiLAM and flat, 100 episodes each
    python eval_libero.py --suite libero_object --out out/libero_object --demos 5 --episodes 20
    python eval_libero.py --suite libero_object --replay DATASETS/libero_object --out out/replay

Adds a line an episode to OUT/eval_SUITE_NAME_DEMOS.jsonl, from which a killed evaluation goes on.
Writes OUT/eval_SUITE_NAME_DEMOS.json, a GIF of each task's first success and first failure, and
OUT/eval_SUITE.png, success over demonstrations with Wilson's 95 % intervals.
"""

import importlib.util
import json
import logging
import math
import multiprocessing
import os
import time
import zlib
from ctypes.util import find_library
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from scipy.stats import binomtest
from tqdm import tqdm

from data import (
    TASKS,
    TOY_LIMIT,
    ToyWorld,
    fail,
    make_parser,
    number,
    resize,
    start,
    toy_text,
    write,
)
from policy import amount, load_agent

# the most steps of an episode
LIMITS = {"toy": TOY_LIMIT, "libero_spatial": 220, "libero_object": 280}
LIMITS |= {"libero_goal": 300, "libero_10": 520}
REST = [0, 0, 0, 0, 0, 0, -1.0]  # LIBERO's action of a settle step
CAMERAS = {"frames": "agentview_image", "wrist": "robot0_eye_in_hand_image"}


def get_args():
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--suite", choices=LIMITS, default="toy", help="what to evaluate in (default: toy)")
    text = "NAMEs of policy.py's files, such as hilam or flat_z0_hand (default: hilam flat)"
    add("--variant", nargs="+", default=["hilam", "flat"], metavar="NAME", help=text)
    text = "the --demos of policy.py, one or several (default: 0.1)"
    add("--demos", type=amount, nargs="+", default=[0.1], help=text)
    text = "run folders; several, one a seed, are pooled (default: out/toy)"
    add("--out", nargs="+", default=["out/toy"], help=text)
    text = "episodes a task (default: 10)"
    add("--episodes", type=number(int, 1), default=10, help=text)
    text = "task numbers, 0 to 9 (default: all)"
    add("--tasks", type=number(int, 0, 9), nargs="+", default=list(range(10)), help=text)
    text = "steps between two decisions; chunks are averaged (default: toy 1, LIBERO 8)"
    add("--execute", type=number(int, 1), help=text)
    add("--max-steps", type=number(int, 1), help="steps of an episode (default: the suite's)")
    text = "LIBERO: steps of rest before the policy acts (default: 10)"
    add("--settle", type=number(int, 1), default=10, help=text)
    text = "LIBERO: the gripper obeys commands beyond +-this, else it goes on (default: 0.5)"
    add("--clear", type=number(float, 0), default=0.5, help=text)
    text = "LIBERO: simulators, a process each (default: 2)"
    add("--workers", type=number(int, 1), default=2, help=text)
    text = "LIBERO: play the demonstrations' own actions from the HDF5 files in DIR"
    add("--replay", metavar="DIR", help=text)
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed of the environments")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    return parser.parse_args()


# ------------------------------------------------------------ the toy world as a pool of simulators
class ToyPool:
    """All episodes at once. jobs: a list of (task, episode).

    A pool has observe() -> the environments that wait for a decision, and execute(actions) -> those
    whose episode ended.
    """

    def __init__(self, jobs, limit, size, seed):
        self.jobs = jobs
        self.limit = limit
        goals = [TASKS[task] for task, _ in jobs]
        self.world = ToyWorld(goals, [[7_000_000 + seed, *job] for job in jobs], "robot", size)
        self.alive = np.ones(len(jobs), bool)
        self.steps = 0

    def observe(self):
        """Numbers of the jobs that wait (B,), frames, wrist (None here), proprio, texts."""
        waiting = np.flatnonzero(self.alive)
        texts = [toy_text(TASKS[self.jobs[i][0]]) for i in waiting]
        return waiting, self.world.frames(waiting), None, self.world.proprio()[waiting], texts

    def execute(self, waiting, actions):
        """actions (B, n, A): n steps of the world; a list of (job, success, steps) that ended."""
        ended = []
        for n in range(actions.shape[1]):
            every = np.zeros((len(self.jobs), actions.shape[2]))
            every[waiting] = actions[:, n]
            success = self.world.step(every)
            self.steps += 1
            over = self.alive & (success | (self.steps >= self.limit))
            ended += [(i, bool(success[i]), self.steps) for i in np.flatnonzero(over)]
            self.alive &= ~over
        return ended

    def close(self):
        pass


# ------------------------------------------------------------- LIBERO's simulators, a process each
def prepare_libero():
    """Make `import libero.libero` safe: installed, a renderer chosen, and the configuration written,
    without which LIBERO asks on the keyboard."""
    if not (importlib.util.find_spec("libero") and importlib.util.find_spec("robosuite")):
        install = (
            "pip install -r requirements.txt && pip install --no-deps libero==0.1.1 bddl==1.0.1"
        )
        fail(f"LIBERO's simulator is not installed; to install it: {install}")
    if "MUJOCO_GL" not in os.environ:
        known = [
            name
            for name, library in (("egl", "EGL"), ("osmesa", "OSMesa"))
            if find_library(library)
        ]
        if not known:
            fail("no headless OpenGL here: apt-get install libegl1 libgl1-mesa-dri (or libosmesa6)")
        os.environ["MUJOCO_GL"] = known[0]
    config = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"), "config.yaml")
    if not config.exists():
        package = importlib.util.find_spec("libero").submodule_search_locations[0]
        folders = {"benchmark_root": ".", "bddl_files": "bddl_files", "init_states": "init_files"}
        folders |= {"datasets": "datasets", "assets": "assets"}
        lines = [f"{key}: {Path(package, 'libero', name)}\n" for key, name in folders.items()]
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text("".join(lines))


def load_states(path):
    """The 50 fixed initial states of a task, from pickled numpy, without running any code in it."""
    rebuild = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
    safe = [rebuild, np.ndarray, np.dtype, np.dtypes.Float64DType]
    with torch.serialization.safe_globals(safe):
        return torch.load(path, weights_only=True)


def set_demonstration(env, path, number):
    """Bring the simulator to a demonstration's first state and return its actions. Where fixtures
    stand is in the demonstration's model, not in its state."""
    import h5py

    with h5py.File(path) as file:
        names = sorted(file["data"], key=lambda name: int(name.split("_")[1]))
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
    """Actions (n, A) whose last number, the gripper's command, is held at the last one beyond
    +-clear (grip: the one before them): a hand that wavers near a grasp drops things."""
    actions = np.array(actions)
    for action in actions:
        grip = action[-1] if abs(action[-1]) > clear else grip
        action[-1] = grip
    return actions


class Simulator:
    """One LIBERO environment at a time, inside a worker process."""

    def __init__(self, suite, args):
        from libero.libero import benchmark

        self.suite = benchmark.get_benchmark(suite)()
        self.limit = args.max_steps or LIMITS[suite]
        self.args = args
        self.env = None
        self.task = None

    def begin(self, number, episode):
        """Start an episode of a task: seed, reset, then the fixed state, in this order. Returns its
        first observation, or with --replay its outcome."""
        from libero.libero import get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        task = self.suite.get_task(number)
        if number != self.task:  # a scene is slow to build
            if self.env is not None:
                self.env.close()
            bddl = Path(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
            sides = {"camera_heights": 128, "camera_widths": 128}
            self.env = OffScreenRenderEnv(bddl_file_name=str(bddl), **sides)
            self.task = number
            folder = Path(get_libero_path("init_states"), task.problem_folder)
            self.states = load_states(folder / task.init_states_file)
        self.switch_cameras(True)
        self.env.seed(self.args.seed)
        self.env.reset()
        self.steps = 0
        self.grip = -1.0
        if self.args.replay:
            file = Path(self.args.replay, f"{task.name}_demo.hdf5")
            actions = set_demonstration(self.env, file, episode)
            _, success, steps = self.run(actions)
            return success, steps
        self.env.set_init_state(self.states[episode % len(self.states)])
        observed, _, _ = self.run([REST] * self.args.settle)
        return self.look(observed)

    def execute(self, actions):
        """Run actions (n, 7); returns the next observation, or (success, steps) at the end."""
        actions = keep_grip(actions[: self.limit - self.steps], self.grip, self.args.clear)
        self.grip = actions[-1, -1]
        observed, success, steps = self.run(actions)
        self.steps += steps
        if success or self.steps >= self.limit:
            return success, self.steps
        return self.look(observed)

    def run(self, actions):
        """Step until success or the last action, for which alone the cameras are on."""
        for i, action in enumerate(actions):
            self.switch_cameras(i == len(actions) - 1)
            observed, _, done, _ = self.env.step(action)
            if done:
                return observed, True, i + 1
        return observed, False, len(actions)

    def switch_cameras(self, on):
        for name in CAMERAS.values():  # set_enabled() would blank the image and restart its clock
            self.env.env._observables[name]._enabled = on

    def look(self, observed):
        """What the policy sees; the sentence is the BDDL file's, as in the demonstrations."""
        seen = {key: observed[name] for key, name in CAMERAS.items()}
        body = [observed["robot0_joint_pos"], observed["robot0_gripper_qpos"]]
        return seen | {"proprio": np.concatenate(body), "text": self.env.language_instruction}


def worker(pipe, suite, args):
    """A process: receives (task, episode), actions (n, 7) or None, sends what the Simulator gives."""
    try:
        logging.disable(logging.WARNING)
        simulator = Simulator(suite, args)
        message = pipe.recv()
        while message is not None:
            begin = isinstance(message, tuple)
            pipe.send(simulator.begin(*message) if begin else simulator.execute(message))
            message = pipe.recv()
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    os._exit(0)  # skips the simulator's noisy destructors


class LiberoPool:
    """ToyPool's interface over --workers processes, spawned: a simulator must not be forked."""

    def __init__(self, jobs, args, size):
        self.jobs = jobs
        self.size = size
        self.left = list(range(len(jobs)))[::-1]
        self.job = {}  # the number of the job that each worker has
        self.seen = {}  # {job: (worker, observation)} that wait for a decision
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for _ in range(min(args.workers, len(jobs))):
            ours, theirs = context.Pipe()
            arguments = (theirs, args.suite, args)
            context.Process(target=worker, args=arguments, daemon=True).start()
            self.pipes.append(ours)
            self.next_job(ours)

    def next_job(self, pipe):
        self.job.pop(pipe, None)
        if self.left:
            self.job[pipe] = self.left.pop()
            pipe.send(self.jobs[self.job[pipe]])

    def receive(self):
        """Wait for a worker or more; keep observations, return the episodes that ended."""
        ended = []
        for pipe in wait([pipe for pipe, job in self.job.items() if job not in self.seen]):
            try:
                message = pipe.recv()
            except EOFError:
                message = "the process died"
            if isinstance(message, str):
                fail(f"a LIBERO worker stopped: {message}")
            if isinstance(message, dict):
                self.seen[self.job[pipe]] = (pipe, message)
            else:
                ended.append((self.job[pipe], *message))
                self.next_job(pipe)
        return ended

    def observe(self):
        waiting = list(self.seen)
        if not waiting:
            return np.zeros(0, int), None, None, None, []
        looks = [look for _, look in self.seen.values()]
        frames, wrist = (resize(np.stack([x[k] for x in looks]), self.size) for k in CAMERAS)
        proprio = np.stack([look["proprio"] for look in looks])
        return np.array(waiting), frames, wrist, proprio, [look["text"] for look in looks]

    def execute(self, waiting, actions):
        for job, chunk in zip(waiting, actions, strict=True):
            pipe, _ = self.seen.pop(job)
            pipe.send(chunk)
        return self.receive()

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)


# --------------------------------------------------------------------------------------- rollouts
class Ensemble:
    """Temporal aggregation: a step's action is the mean of all chunks that predicted it, weighted by
    exp(-0.01 i), i counted from the oldest (ACT, BAKU)."""

    def __init__(self):
        self.past = {}  # {job: (age, weighted sum of chunks, sum of weights), from now on}

    def __call__(self, waiting, chunks, execute):
        """chunks (B, chunk, A), predicted now -> the next `execute` actions of each job."""
        actions = []
        for job, chunk in zip(waiting, chunks, strict=True):
            age, total, weight = self.past.get(job, (0, np.zeros_like(chunk), np.zeros(len(chunk))))
            total = total + math.exp(-0.01 * age) * chunk
            weight = weight + math.exp(-0.01 * age)
            actions.append(total[:execute] / weight[:execute, None])
            total = np.concatenate([total[execute:], np.zeros_like(total[:execute])])
            weight = np.concatenate([weight[execute:], np.zeros(execute)])
            self.past[job] = (age + execute, total, weight)
        return np.stack(actions)


def rate(results):
    """Success of some episodes, records with a key success: its share, Wilson's 95 % interval."""
    wins, episodes = sum(record["success"] for record in results), len(results)
    interval = binomtest(wins, episodes).proportion_ci(method="wilson")
    ci95 = [round(float(interval.low), 4), round(float(interval.high), 4)]
    return {"success_rate": round(wins / episodes, 4), "ci95": ci95, "episodes": episodes}


def save_film(path, film, upside_down):
    """Save frames (S, S, 3) as a GIF, enlarged, unless there is one already."""
    if film and not path.exists():
        images = [Image.fromarray(frame[::-1] if upside_down else frame) for frame in film]
        images = [image.resize((192, 192), Image.NEAREST) for image in images]
        pace = 300 if upside_down else 100  # milliseconds; LIBERO is seen every 8 steps
        images[0].save(path, save_all=True, append_images=images[1:], duration=pace, loop=0)


def read_records(log, settings):
    """The episodes that a log (.jsonl) already holds under these settings: {(task, episode): record}.
    A last line that a kill cut off is removed."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines = lines[:-1]
        log.write_text("".join(lines))
    records = {}
    for line in lines:
        record = json.loads(line)
        if record.pop("settings") == settings:
            records[record["task"], record["episode"]] = record
    return records


def run_episodes(jobs, pool, agent, execute, record_end):
    """The rollout loop: observe, decide, execute, until every job has ended."""
    ensemble = Ensemble()
    films = {}
    left = len(jobs)
    while left:
        waiting, frames, wrist, proprio, texts = pool.observe()
        if len(waiting):
            for job, frame in zip(waiting, frames, strict=True):
                films.setdefault(job, []).append(frame)
            chunks, _ = agent.act(frames, wrist, proprio, texts)
            ended = pool.execute(waiting, ensemble(waiting, chunks, execute))
        else:
            ended = pool.receive()
        for job, success, steps in ended:
            record_end(jobs[job], success, steps, films.pop(job, []))
            left -= 1


def evaluate(args, out, name, demos):
    """Roll out one policy, what of it is not in its log; returns what its .json holds."""
    device, _, _ = start(out, args.device)
    toy = args.suite == "toy"
    stem = f"eval_{args.suite}_{name}" + ("" if args.replay else f"_{demos}")
    log = Path(out, f"{stem}.jsonl")
    agent, trained = None, None
    if not args.replay:
        agent = load_agent(out, name, demos, device)
        trained = zlib.crc32(Path(out, f"policy_{name}_{demos}.pt").read_bytes())
        if agent.shape["proprio"] != (3 if toy else 9):
            fail(f"{out}/policy_{name}_{demos}.pt is of other data than --suite {args.suite}")
    execute = args.execute or (1 if toy else 8)
    execute = min(execute, agent.low.chunk) if agent else execute
    limit = args.max_steps or LIMITS[args.suite]
    settings = {"suite": args.suite, "policy": trained, "execute": execute, "limit": limit}
    settings |= {"seed": args.seed, "settle": args.settle, "clear": args.clear}
    settings |= {"replay": args.replay}
    done = read_records(log, settings)
    wanted = [(task, episode) for task in args.tasks for episode in range(args.episodes)]
    jobs = [job for job in wanted if job not in done]
    begin, steps_run = time.time(), []
    if not done:
        for film in Path(out).glob(f"{stem}_task*.gif"):  # those of an older policy
            film.unlink()
    if jobs:
        bar = tqdm(total=len(jobs), desc=f"{args.suite} {name}", disable=None)
        with open(log, "a") as file:

            def record_end(job, success, steps, film):
                record = {"task": job[0], "episode": job[1], "success": success, "steps": steps}
                done[job] = record
                file.write(json.dumps(record | {"settings": settings}) + "\n")
                file.flush()
                outcome = "success" if success else "failure"
                save_film(Path(out, f"{stem}_task{job[0]}_{outcome}.gif"), film, not toy)
                steps_run.append(steps)
                bar.update()

            size = agent.shape["size"] if agent else None
            pool = ToyPool(jobs, limit, size, args.seed) if toy else LiberoPool(jobs, args, size)
            run_episodes(jobs, pool, agent, execute, record_end)
            pool.close()
        bar.close()
    results = [done[job] for job in wanted]
    tasks = {str(t): rate([r for r in results if r["task"] == t]) for t in args.tasks}
    report = {"variant": name, "demos": demos} | rate(results) | {"per_task": tasks}
    report |= {
        "settings": settings,
        "versions": versions(),
        "renderer": os.environ.get("MUJOCO_GL"),
    }
    if jobs:
        report["env_steps_per_second"] = round(sum(steps_run) / (time.time() - begin), 1)
    write(Path(out, f"{stem}.json"), report)
    return report


def versions():
    """Versions of the packages that decide an episode's outcome, those that are installed."""
    found = {}
    for name in ("torch", "numpy", "mujoco", "robosuite", "libero"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def summarise(reports, suite, path):
    """Print success by policy and number of demonstrations, pooled over run folders (seeds), and
    draw it with its intervals."""
    cells = {}
    for report in reports:
        cells.setdefault((report["variant"], report["demos"]), []).append(report)
    print(f"\n{'policy':24} {'demos':>6} {'success':>8}   95 % interval   episodes   by run folder")
    figure = Figure((7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name in dict.fromkeys(variant for variant, _ in cells):
        points = []
        for (variant, demos), runs in cells.items():
            if variant != name:
                continue
            wins = sum(round(run["success_rate"] * run["episodes"]) for run in runs)
            episodes = sum(run["episodes"] for run in runs)
            total = rate([{"success": i < wins} for i in range(episodes)])
            low, high = total["ci95"]
            each = " ".join(f"{run['success_rate']:.2f}" for run in runs)
            success = f"{total['success_rate']:8.2f}   [{low:.2f}, {high:.2f}]"
            print(f"{name:24} {demos:>6} {success}    {episodes:8d}   {each}")
            points.append((str(demos), total["success_rate"], low, high))
        demos, middle, low, high = zip(*points, strict=True)
        middle, low, high = np.array(middle), np.array(low), np.array(high)
        axis.errorbar(
            demos, middle, [middle - low, high - middle], marker="o", capsize=4, label=name
        )
    axis.set(xlabel="labelled demonstrations a task", ylabel=f"success, {suite}", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    write(path, figure)


def main():
    args = get_args()
    for key in ("variant", "demos", "out", "tasks"):  # what is named twice is no second evidence
        setattr(args, key, list(dict.fromkeys(getattr(args, key))))
    if args.suite != "toy":
        prepare_libero()
    if args.replay and (args.suite == "toy" or not list(Path(args.replay).glob("*_demo.hdf5"))):
        fail(f"--replay {args.replay}: for LIBERO's suites, a folder of *_demo.hdf5 files")
    reports = []
    for out in args.out:
        for demos in [0] if args.replay else args.demos:
            for name in ["replay"] if args.replay else args.variant:
                reports.append(evaluate(args, out, name, demos))
    summarise(reports, args.suite, Path(args.out[0], f"eval_{args.suite}.png"))


if __name__ == "__main__":
    main()
