"""
Stage 4, evaluation: success rates of trained policies, in the built-in toy world or in LIBERO's simulator, through one loop.

LIBERO's protocol (as OpenVLA-OFT and LeRobot run it): every episode starts from one of the benchmark's fixed initial states, rests
10 steps so that objects fall into place, and counts as a success as soon as the environment says so, within 220 / 280 / 300 / 520 steps
(spatial / object / goal / 10). Environments live in worker processes of their own; the policy sees all that wait for it as one batch, and
cameras are rendered only when it decides, every --execute steps.

    python eval_libero.py                                                        # toy world: hilam and flat, 100 episodes each
    python eval_libero.py --suite libero_object --out out/libero_object --demos 5 --episodes 20
    python eval_libero.py --suite libero_object --replay DATASETS/libero_object --out out/replay      # demonstrations' own actions

Appends a line an episode to OUT/eval_SUITE_VARIANT.jsonl, from which a killed evaluation goes on; writes OUT/eval_SUITE_VARIANT.json, GIFs
of each task's first success and failure (with the number in their names where --demos has several), OUT/eval_SUITE.png. Wilson's intervals.
"""
import argparse, importlib.util, itertools, json, math, multiprocessing, os, time, zlib
from ctypes.util import find_library
from importlib.metadata import distributions
from multiprocessing.connection import wait
from pathlib import Path
from xml.etree import ElementTree
import numpy as np
import torch
from scipy.stats import binomtest
from PIL import Image, ImageDraw
from tqdm import tqdm
from data import TASKS, TOY_LIMIT, ToyWorld, fail, resize, toy_text, write
from lam import setup
from policy import amount, load_agent

SUITES = dict(toy=TOY_LIMIT, libero_spatial=220, libero_object=280, libero_goal=300, libero_10=520)     # the most steps of an episode
INSTALL = "pip install -r requirements.txt && pip install --no-deps libero==0.1.1 bddl==1.0.1"

def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error, add = fail, parser.add_argument
    add("--suite", choices=SUITES, default="toy", metavar="NAME", help=f"{', '.join(SUITES)} (default: %(default)s)")
    add("--variant", nargs="+", default=["hilam", "flat"], metavar="NAME", help="runs of policy.py, flat_z0_hand say (default: hilam flat)")
    add("--demos", type=amount, nargs="+", default=[0.1], help="the --demos of policy.py, one or several (default: 0.1)")
    add("--out", nargs="+", default=["out/toy"], help="run folder; several, one a seed, are pooled in the table (default: out/toy)")
    add("--episodes", type=int, default=10, help="episodes a task (default: %(default)s)")
    add("--tasks", type=int, nargs="+", choices=range(10), metavar="N", help="task numbers, 0 to 9 (default: all)")
    add("--execute", type=int, help="steps between two decisions; overlapping chunks are averaged (default: toy 1, LIBERO 8)")
    add("--max-steps", type=int, help="steps after which an episode has failed (default: the suite's)")
    add("--settle", type=int, default=10, help="LIBERO: steps of rest before the policy acts (default: %(default)s)")
    add("--workers", type=int, default=2, help="LIBERO: environments, one process each (default: %(default)s)")
    add("--clear", type=float, default=0.5, help="LIBERO: the gripper obeys commands beyond +-this, else it goes on (default: %(default)s)")
    add("--camera", type=int, default=128, help="LIBERO: side of the rendered images, resized to the policy's (default: %(default)s)")
    add("--replay", metavar="DIR", help="LIBERO: instead of a policy's, play the actions of the HDF5 files in DIR")
    add("--seed", type=int, default=0, help="seed of the environments (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    return parser.parse_args(argv)

# ---------------------------------------------------------------- the toy world as a pool of environments
class ToyPool:
    """All episodes at once. A pool has observe() -> the environments that wait for a decision, execute(actions) -> those that ended."""
    def __init__(self, jobs, args, size):
        self.jobs, self.limit = jobs, args.max_steps or TOY_LIMIT
        self.world = ToyWorld("robot", size).reset([TASKS[t] for t, _ in jobs], [[7_000_000 + args.seed, t, e] for t, e in jobs])
        self.alive, self.steps = np.ones(len(jobs), bool), 0
    def observe(self):
        """slots (indices into jobs), frames, wrist (None here), proprio, texts."""
        slots = np.flatnonzero(self.alive)
        return slots, self.world.frames(slots), None, self.world.proprio()[slots], [toy_text(TASKS[self.jobs[i][0]]) for i in slots]
    def execute(self, slots, actions):
        """actions (B, n, A): steps the world n times; returns a list of (slot, success, steps) of the episodes that ended."""
        full, ended = np.zeros((len(self.jobs), *actions.shape[1:])), []
        full[slots] = actions
        for n in range(actions.shape[1]):
            self.steps += 1
            success = self.world.step(full[:, n]) & self.alive
            for i in np.flatnonzero(success | self.alive & (self.steps >= self.limit)):
                ended.append((i, bool(success[i]), self.steps))
                self.alive[i] = False
        return ended
    close = lambda self: None

# ---------------------------------------------------------------- LIBERO's environments, one process each
def prepare_libero():
    """Make `import libero.libero` safe: installed, a renderer chosen, configuration written (without it LIBERO asks on the keyboard)."""
    if importlib.util.find_spec("libero") is None or importlib.util.find_spec("robosuite") is None:
        fail(f"LIBERO's simulator is not installed; to install it: {INSTALL}")
    if "MUJOCO_GL" not in os.environ:
        backend = next((name for name, library in (("egl", "EGL"), ("osmesa", "OSMesa")) if find_library(library)), None)
        if backend is None:
            fail("no headless OpenGL to render with: install EGL (apt-get install libegl1 libgl1-mesa-dri) or OSMesa (libosmesa6)")
        os.environ["MUJOCO_GL"] = backend
    config = Path(os.environ.get("LIBERO_CONFIG_PATH", Path.home() / ".libero"), "config.yaml")
    if not config.exists():
        root = Path(list(importlib.util.find_spec("libero").submodule_search_locations)[0], "libero")
        config.parent.mkdir(parents=True, exist_ok=True)
        folders = dict(benchmark_root=".", bddl_files="bddl_files", init_states="init_files", datasets="datasets", assets="assets")
        config.write_text("".join(f"{key}: {root / folder}\n" for key, folder in folders.items()))

def replay(env, path, number):
    """Bring the simulator to a demonstration's first state; returns its actions. Where fixtures stand is in its model, not in its state."""
    import h5py
    with h5py.File(path) as file:
        names = sorted(file["data"], key=lambda name: int(name.split("_")[1]))
        if number >= len(names):
            raise ValueError(f"{path} holds {len(names)} demonstrations, choose --episodes {len(names)}")
        demo = file["data"][names[number]]
        state, actions, model = demo["states"][0], demo["actions"][:], env.env.sim.model
        for body in ElementTree.fromstring(demo.attrs["model_file"]).find("worldbody").findall("body"):
            if body.get("name") in model.body_names:
                i = model.body_name2id(body.get("name"))
                model.body_pos[i] = [float(x) for x in body.get("pos", "0 0 0").split()]
                model.body_quat[i] = [float(x) for x in body.get("quat", "1 0 0 0").split()]
    env.set_init_state(state)
    return actions

def keep_grip(actions, grip, clear):
    """Actions (n, A) with the last number, the gripper's command, held at the last one beyond +-clear (before them: grip). A hand that
    wavers drops things: policies trained with l1 predict -1 or 1 while they are sure, and anything between while they are not."""
    for action in (actions := np.array(actions)):
        action[-1] = grip = action[-1] if abs(action[-1]) > clear else grip
    return actions

def worker(pipe, suite, args):
    """One process, one environment at a time. Receives (task, episode) or actions (n, 7); sends observations and outcomes."""
    try:
        import logging
        logging.disable(logging.WARNING)
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv
        bench, env, current = benchmark.get_benchmark(suite)(), None, None
        cameras = dict(frames="agentview_image", wrist="robot0_eye_in_hand_image")

        def look(o):
            proprio = np.concatenate([o["robot0_joint_pos"], o["robot0_gripper_qpos"]])
            return {key: o[name] for key, name in cameras.items()} | dict(proprio=proprio)

        def cameras_on(on):                                        # set_enabled() would blank the image and restart its sampling clock
            for name in cameras.values():
                env.env._observables[name]._enabled = on

        def run(actions):                                          # cameras are on for the last step only
            for i, action in enumerate(actions):
                cameras_on(i == len(actions) - 1)
                o, _, done, _ = env.step(action)
                if done:
                    return o, True, i + 1
            return o, False, len(actions)

        while True:
            message = pipe.recv()
            if message is None:
                break
            if isinstance(message, tuple):
                number, episode = message
                task = bench.get_task(number)
                if number != current:
                    if env is not None:
                        env.close()
                    bddl = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
                    env, current = OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=args.camera, camera_widths=args.camera), number
                    rebuild = (np._core.multiarray._reconstruct, "numpy.core.multiarray._reconstruct")
                    with torch.serialization.safe_globals([rebuild, np.ndarray, np.dtype, np.dtypes.Float64DType]):      # pickled numpy
                        file = os.path.join(get_libero_path("init_states"), task.problem_folder, task.init_states_file)
                        states = torch.load(file, weights_only=True)
                cameras_on(True)
                env.seed(args.seed)                                # this order: seed, reset, then the fixed state
                env.reset()
                if args.replay:
                    pipe.send(run(replay(env, Path(args.replay, f"{task.name}_demo.hdf5"), episode))[1:])
                    continue
                env.set_init_state(states[episode % len(states)])
                o, _, _ = run(actions := np.array([[0, 0, 0, 0, 0, 0, -1.0]] * max(1, args.settle)))
                steps, limit = 0, args.max_steps or SUITES[suite]
                pipe.send((look(o), env.language_instruction))
            else:
                o, success, n = run(actions := keep_grip(message[:limit - steps], actions[-1, -1], args.clear))
                steps += n
                over = success or steps >= limit
                pipe.send((success, steps) if over else (look(o), env.language_instruction))
    except (EOFError, KeyboardInterrupt):
        pass
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    os._exit(0)                                                    # skips the simulator's noisy destructors

class LiberoPool:
    """The same interface as ToyPool, over --workers processes (spawned: a simulator must not be forked)."""
    def __init__(self, jobs, args, size):
        self.queue, self.jobs, self.size, self.observed = list(range(len(jobs)))[::-1], jobs, size, {}
        context, self.pipes, self.slot = multiprocessing.get_context("spawn"), [], {}
        for _ in range(min(args.workers, len(jobs))):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, args.suite, args), daemon=True).start()
            self.pipes.append(ours)
            self.next_job(ours)
    def next_job(self, pipe):
        self.slot.pop(pipe, None)
        if self.queue:
            self.slot[pipe] = self.queue.pop()
            pipe.send(self.jobs[self.slot[pipe]])
    def receive(self):
        """Wait for at least one worker; returns the episodes that ended and files the observations that arrived."""
        ended = []
        for pipe in wait([p for p in self.slot if self.slot[p] not in self.observed]):
            try:
                message = pipe.recv()
            except EOFError:
                message = "the process died"
            if isinstance(message, str):
                fail(f"a LIBERO worker stopped: {message}")
            if isinstance(message[0], dict):
                self.observed[self.slot[pipe]] = (pipe, *message)
            else:
                ended.append((self.slot[pipe], *message))
                self.next_job(pipe)
        return ended
    def observe(self):
        slots = list(self.observed)
        obs, texts = zip(*[self.observed[s][1:] for s in slots]) if slots else ([], [])
        stack = lambda key: np.stack([o[key] for o in obs]) if obs else np.zeros(0)
        frames, wrist = (resize(stack(key), self.size) if obs else None for key in ("frames", "wrist"))
        return np.array(slots, int), frames, wrist, stack("proprio"), list(texts)
    def execute(self, slots, actions):
        for s, a in zip(slots, actions):
            self.observed.pop(s)[0].send(a)
        return self.receive()
    def close(self):
        for pipe in self.pipes:
            pipe.send(None)

# ---------------------------------------------------------------- rollouts
class Ensemble:
    """Temporal aggregation: a step's action is the mean of all chunks that predicted it, older ones heavier (ACT, BAKU: exp(-0.01 i))."""
    def __init__(self):
        self.total, self.weight, self.age = {}, {}, {}
    def __call__(self, slots, chunks, execute):
        """slots (B,), chunks (B, chunk, A) predicted now -> the next `execute` actions of each, (B, execute, A)."""
        out = []
        for slot, new in zip(slots, chunks):
            w = math.exp(-0.01 * self.age.get(slot, 0))
            total, weight = self.total.get(slot, np.zeros_like(new)) + w * new, self.weight.get(slot, np.zeros(len(new))) + w
            out.append(total[:execute] / weight[:execute, None])
            shift = lambda x: np.concatenate([x[execute:], np.zeros_like(x[:execute])])
            self.total[slot], self.weight[slot], self.age[slot] = shift(total), shift(weight), self.age.get(slot, 0) + execute
        return np.stack(out)

def wilson(successes, n):
    """Wilson's 95 % interval of a success rate."""
    interval = binomtest(successes, n).proportion_ci(method="wilson")
    return [float(interval.low), float(interval.high)]

def rate(results):
    """Success of some episodes, records with a key success: its share, Wilson's interval, their number."""
    wins, n = sum(r["success"] for r in results), len(results)
    return dict(success_rate=wins / n, ci95=wilson(wins, n), episodes=n)

def evaluate(args, variant, device):
    """Roll out one variant; returns the record that eval_SUITE_VARIANT.json holds."""
    path, log = Path(args.out, f"policy_{variant}_{args.demos}.pt"), Path(args.out, f"eval_{args.suite}_{variant}.jsonl")
    stem, done = Path(args.out, f"eval_{args.suite}_{variant}{args.suffix}"), {}
    agent = None if args.replay else load_agent(args.out, variant, args.demos, device)
    if agent and agent.shape["proprio"] != (3 if args.suite == "toy" else 9):
        fail(f"{path} was trained on other data than those of --suite {args.suite}")
    execute = min(args.execute or (1 if args.suite == "toy" else 8), agent.low.chunk if agent else 8)
    settings = {k: v for k, v in vars(args).items() if k not in ("variant", "tasks", "episodes", "workers", "out", "device", "suffix")}
    settings |= dict(execute=execute, trained=zlib.crc32(path.read_bytes()) if agent else None)            # which policy
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    if lines and not lines[-1].endswith("\n"):                                   # a kill cut the last line off
        log.write_text("".join(lines := lines[:-1]))
    for record in map(json.loads, lines):
        if record.pop("settings") == settings:
            done[record["task"], record["episode"]] = record
    wanted = [(t, e) for e in range(args.episodes) for t in args.tasks]
    jobs = sorted(j for j in wanted if j not in done)                            # task by task: a LIBERO scene is slow to build
    if not done:
        [path.unlink() for path in stem.parent.glob(f"{stem.name}_task*.gif")]                                # those of an older policy
    films, begin, steps = {}, time.time(), 0
    if jobs:
        pool, ensemble = (ToyPool if args.suite == "toy" else LiberoPool)(jobs, args, agent and agent.shape["size"]), Ensemble()
        bar, left, ended = tqdm(total=len(jobs), desc=f"{args.suite} {variant}", disable=None), len(jobs), []
        with open(log, "a") as file:
            while left:
                slots, frames, wrist, proprio, texts = pool.observe()
                if len(slots):
                    [films.setdefault(slot, []).append(frame) for slot, frame in zip(slots, frames)]
                    ended = pool.execute(slots, ensemble(slots, agent.act(frames, wrist, proprio, texts)[0], execute))
                else:
                    ended = pool.receive()
                for slot, success, n in ended:
                    record = dict(task=jobs[slot][0], episode=jobs[slot][1], success=success, steps=n)
                    done[jobs[slot]] = record
                    file.write(json.dumps(record | dict(settings=settings)) + "\n"), file.flush()
                    left, steps = left - 1, steps + n
                    keep(films.pop(slot, []), stem, f"task{jobs[slot][0]}_{'success' if success else 'failure'}", args.suite != "toy")
                    bar.update()
        pool.close(), bar.close()
    results, seconds = [done[j] for j in wanted], time.time() - begin
    record = dict(suite=args.suite, variant=variant, demos=args.demos) | rate(results) | dict(
        per_task={str(t): rate([r for r in results if r["task"] == t]) for t in args.tasks},
        env_steps_per_second=steps / seconds if jobs else None, seconds=seconds, settings=settings, renderer=os.environ.get("MUJOCO_GL"),
        versions={d.name: d.version for d in distributions() if d.name in ("torch", "numpy", "mujoco", "robosuite", "libero")})
    write(f"{stem}.json", record)
    return record

def keep(film, stem, outcome, upside_down):
    """Save a film (T, H, W, 3) as a GIF, enlarged, unless there is one already: a task's first success and first failure."""
    if film and not (path := Path(f"{stem}_{outcome}.gif")).exists():
        images = [Image.fromarray(np.ascontiguousarray(f[::-1] if upside_down else f)) for f in film]
        images = [i.resize((max(192, i.width),) * 2, Image.NEAREST) for i in images]
        images[0].save(path, save_all=True, append_images=images[1:], duration=100 if not upside_down else 300, loop=0)

def report(records, suite, path):
    """Print success by variant and number of demonstrations, pooled over run folders (seeds); draw it with its intervals."""
    cells, last = {}, {}
    for r in records:
        cells.setdefault((r["variant"], str(r["demos"])), []).append(r)        # 1 is one demonstration, 1.0 all of them
    demos, canvas = sorted({d for _, d in cells}, key=float), Image.new("RGB", (640, 420), "white")
    draw, place = ImageDraw.Draw(canvas), lambda d, p, i=0: (90 + 400 * demos.index(d) / max(1, len(demos) - 1) + 9 * i, 380 - 350 * p)
    for p in (0, 0.25, 0.5, 0.75, 1):
        draw.line([(60, 380 - 350 * p), (620, 380 - 350 * p)], fill="lightgray"), draw.text((20, 374 - 350 * p), f"{p:.2f}", fill="black")
    [draw.text((place(d, 0)[0] - 8, 390), d, fill="black") for d in demos]
    print(f"\n{'suite':15} {'variant':14} {'demos a task':>12} {'success':>8}   {'95 % interval':14} {'episodes':8}   by run folder")
    names = list(dict.fromkeys(variant for variant, _ in cells))
    for (variant, d), runs in sorted(cells.items(), key=lambda cell: (demos.index(cell[0][1]), names.index(cell[0][0]))):
        i, n, rates = names.index(variant), sum(r["episodes"] for r in runs), [r["success_rate"] for r in runs]
        mean = float(np.average(rates, weights=[r["episodes"] for r in runs]))
        low, high = wilson(round(mean * n), n)
        print(f"{suite:15} {variant:14} {d:>12} {mean:8.2f}   [{low:.2f}, {high:.2f}]   {n:8d}   {' '.join(f'{x:.2f}' for x in rates)}")
        (x, y), colour = place(d, mean, i), "blue orange green purple brown red gray".split()[i % 7]
        draw.text((x + 6, y - 6), variant, fill=colour), draw.line([place(d, low, i), place(d, high, i)], fill=colour, width=2)
        draw.line([last.get(variant, (x, y)), (x, y)], fill=colour, width=2)
        last[variant] = x, y
    write(path, canvas)

def main():
    args = get_args()
    for key in ("variant", "demos", "out", "tasks"):                             # an evaluation named twice is no second evidence
        setattr(args, key, list({str(v).rstrip("/"): v for v in getattr(args, key) or range(10)}.values()))
    if args.replay and (args.suite == "toy" or not list(Path(args.replay).glob("*_demo.hdf5"))):
        fail(f"--replay {args.replay}: no *_demo.hdf5 files there" if args.suite != "toy" else "--replay is for LIBERO's suites")
    if args.suite != "toy":
        prepare_libero()
    records = []
    for out, demos in itertools.product(args.out, [0] if args.replay else args.demos):
        own = argparse.Namespace(**vars(args) | dict(out=out, demos=demos, suffix=f"_{demos}" if len(args.demos) > 1 else ""))
        records += [evaluate(own, variant, setup(own)) for variant in (["replay"] if args.replay else args.variant)]
    report(records, args.suite, Path(args.out[0], f"eval_{args.suite}.png"))

if __name__ == "__main__":
    main()
