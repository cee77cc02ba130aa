"""
Tests of everything on tiny data, 100 s with LIBERO: python -m pytest -q test_all.py
Kill each script at 20 random moments and compare, half an hour: python test_all.py --kill 20
Speed of chunking (pip install h-net-dynamic-chunking==0.5.19): python test_all.py
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import data
import eval_libero
import lam
import policy
import skills

# one thread here and in the scripts started below: sums are then made in one order
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

TRAIN = ["--steps", 4, "--log-every", 2, "--batch", 8]
SMALL = [*TRAIN, "--width", 16, "--layers", 1]
TINY = {  # words that make a script's run short
    data: ["--src", "raw", "--out", "set/", "--size", 16],
    lam: [*TRAIN, "--width", 8],
    skills: SMALL,
    policy: [*SMALL, "--channels", 8, "--pretrain-steps", 4, "--demos", 1],
    eval_libero: ["--demos", 1, "--tasks", 0, 3, 5, "--episodes", 1, "--max-steps", 6],
}
STAGES = {"out/toy/lam": lam, "out/toy/skills": skills}  # {checkpoint: the script that writes it}
STAGES |= {"out/toy/policy_pretrain_skills1_latents": policy, "out/toy/policy_hilam_1": policy}
LAM = {"wrist": False, "gap": 4, "latent": 4, "width": 8, "odd": False}
POLICY = {"width": 16, "channels": 8, "patch": 4, "chunk": 4}
FRAMES, TEXTS = "data/toy/hand/frames.bin", "data/toy/robot/episodes.json"
ACTIONS = "data/toy/robot/actions.bin"
PRETRAINED = "out/toy/policy_pretrain_skills1_latents.pt"
FIRST, LATENTS = "out/toy/lam.pt", "out/toy/latents.hand.npy"
RECORDS = "out/toy/eval_toy_hilam_1_tasks0-3-5.jsonl"
PROMPT = ["--variant", "hilam", "--prompt", "video"]
GREYS = [20 * i for i in range(12)]  # of the frames of a clip
CAPTIONS = {
    "a.json": '[{"id": "b/2", "label": "push; a cup"}, {"id": 1, "label": "hold a pen"}]',
    "b.json": '{"2": "push; a cup", "1": "hold a pen"}',
    "c.csv": 'id;label\nb/2.MKV;"push; a cup"\n1;hold a pen\n',
    "d.csv": "id,label\n2.MKV,push; a cup\n1,hold a pen\n",
}
HNETS = pytest.mark.parametrize("stages, gap", [(2, 1), (3, 4)])


# ---------------------------------------------------------------------------------------- helpers
def run(script, *words):
    """Run main() of a script in this process, with its tiny words and these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, [*TINY[script], *words])])
        patch.setattr(data, "interrupted", signal.default_int_handler)  # Ctrl-C ends the tests
        script.main()


def contents(folder):
    """{path: bytes} of all files under a folder, but those that only say who writes."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_same(one, two):
    """Two folders hold the same files, but checkpoints the same weights, optimizer and log."""
    assert contents(one).keys() == contents(two).keys()
    for name, content in contents(one).items():
        if name.endswith(".pt"):
            a, b = torch.load(one / name), torch.load(two / name)
            for key in ("model", "optimizer", "log", "step"):
                torch.testing.assert_close(a[key], b[key], rtol=0, atol=0)
        else:
            assert content == (two / name).read_bytes(), name


def python(words, folder=".", seconds=None):
    """Run Python with these words in a folder, without an error; after so many seconds kill it."""
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=folder, timeout=seconds, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def replace_bytes(path, old, new):
    """Replace bytes in a file."""
    Path(path).write_bytes(Path(path).read_bytes().replace(old, new))


def masked(lengths, longest):
    """A mask (B, longest), True at the first so many positions of each row."""
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def noise(*shape, seed=0):
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(model):
    """The model with random weights everywhere: as built, many blocks are the identity."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.detach().normal_(std=0.3)
    return model.requires_grad_(False).eval()


def hnet(stages, gap):
    """A random H-Net for latents of 5 numbers."""
    settings = {"width": 16, "chunk": [4.0] * stages, "layers": 1, "least": 3}
    return randomised(skills.HNet(settings, 5, gap))


def cut(model, z, mask):
    """An H-Net's boundaries (T, stages) in episodes z (B, L, D), as long as mask (B, L) says."""
    length = mask.sum(1).numpy()
    episodes = SimpleNamespace(name="set", start=length.cumsum() - length, length=length)
    return skills.segment(model, episodes, z[mask].numpy(), 0, "cpu")[0]


def agent(skill, low_text=False, layers=1, cameras=1, proprio=3, target=3):
    """A random policy for frames of 32 x 32; skill: its width, 0 for a flat one."""
    shape = {"size": 32, "cameras": cameras, "high_cameras": cameras, "skill": skill}
    shape |= {"proprio": proprio, "target": target}
    return randomised(policy.Agent(shape, POLICY | {"low_text": low_text, "layers": layers}))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def dataset():
    """A packed set of 6 + 9 frames to train on and 4 held out; all numbers of row t are t."""
    episodes = []
    for first, end, split in ((0, 6, "train"), (6, 15, "train"), (15, 19, "val")):
        t = np.arange(first, end, dtype=np.float32)[:, None]
        frames = np.tile(t[..., None, None].astype(np.uint8), (1, 16, 16, 3))
        episodes.append(("lift", "a", split, {"frames": frames, "actions": np.tile(t, 2)}))
    data.pack("set", episodes)
    return data.Packed("set")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny toy world, data/toy, and all that the scripts make of it, out/toy."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.pack_toy("data/toy", hand=12, demos=2)
        for script in (lam, skills, policy):
            run(script)
        run(policy, "--variant", "flat")
        run(eval_libero)
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """The test's folder, with a copy of the same toy world and all that was made of it."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


# -------------------------------------------------------------------------- H-Net and its skills
@pytest.mark.parametrize("least, apart", [(1, 1), (4, 1), (3, 3)])
def test_route_equals_the_loop(least, apart):
    q, k = noise(2, 20, 3).requires_grad_(), noise(2, 20, 3, seed=1).requires_grad_()
    mask = masked([20, 9], 20)

    p, boundary = skills.route(q, k, mask, least, apart)

    loop = torch.ones(2, 20)
    for b, t in np.ndindex(2, 20):
        if t > 0:
            loop[b, t] = (1 - torch.cosine_similarity(q[b, max(0, t - apart)], k[b, t], 0)) / 2
        recent = boundary[b, max(0, t - least + 1) : t].any()
        assert boundary[b, t] == (loop[b, t] >= 0.5 and mask[b, t] and not recent)
    torch.testing.assert_close(p, loop)
    found, true = (torch.autograd.grad(out.sum(), (q, k)) for out in (p, loop))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


def test_chunk_and_dechunk_and_their_gradients_equal_the_loop():
    h, p = noise(3, 40, 5).requires_grad_(), noise(3, 40).sigmoid().requires_grad_()
    boundary = ((p >= 0.5) | (torch.arange(40) == 0)) & masked([40, 40, 15], 40)

    z, mask, position = skills.chunk(h, boundary)
    ours = skills.dechunk(z, p, boundary, position)

    assert mask.sum(1).tolist() == boundary.sum(1).tolist() and torch.equal(z[mask], h[boundary])
    y, smoothed = torch.zeros(3, 5), []
    for t in range(40):  # H-Net's equations: at a boundary y = (1 - p) y + p h
        weight = (p[:, t].clamp(1e-4, 1 - 1e-4) * boundary[:, t])[:, None]
        y = (1 - weight) * y + weight * h[:, t]
        smoothed.append(y)
    confidence = torch.where(boundary, p, 1 - p)[..., None]
    loop = torch.stack(smoothed, dim=1) * (1 + confidence - confidence.detach())
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-5)
    found, true = (torch.autograd.grad(out.tanh().sum(), (h, p)) for out in (ours, loop))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, g, n, loss", [(1, 0.25, 4, 1), (2, 0.5, 4, 4 / 3), (0, 0, 3, 1.5)])
def test_ratio_loss_counts_no_padding(count, g, n, loss):
    mask = masked([4], 6)
    boundary = masked([count], 6) | ~mask  # at padding everything speaks for a boundary
    p = torch.where(mask, g, 0.9)

    found = skills.ratio_loss(boundary, p, mask, n)

    assert [x.item() for x in found] == pytest.approx([loss, count / 4, g], rel=1e-5)


def test_router_at_first_compares_adjacent_latents_as_they_are():
    settings = {"width": 16, "chunk": [4.0, 4.0], "layers": 2, "least": 1}
    model, z = skills.HNet(settings, 5, 1), noise(1, 20, 5)

    _, routings = model(z, masked([20], 20))

    expected = (1 - torch.cosine_similarity(z[:, :-1], z[:, 1:], dim=2)) / 2
    torch.testing.assert_close(routings[0].probability[:, 1:], expected, rtol=1e-4, atol=1e-4)


@HNETS
@pytest.mark.parametrize("t", [1, 6, 8])
def test_hnet_is_causal(stages, gap, t):
    model, mask = hnet(stages, gap), masked([24, 15, 9], 24)
    z, changed = noise(3, 24, 5), noise(3, 24, 5)
    changed[:, t] = noise(3, 5, seed=1)

    (before, _), (after, _) = model(z, mask), model(changed, mask)
    marks, other_marks = (cut(model, x, mask) for x in (z, changed))

    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-4, atol=1e-4)
    assert (before - after)[:, t:].abs().amax((1, 2)).min() > 1e-2
    past = mask.nonzero()[:, 1] < t
    assert np.array_equal(marks[past], other_marks[past])
    assert 1 < marks[:24, -1].sum() < 24


@HNETS
@pytest.mark.parametrize("rows, length", [([0, 1, 2], 24), ([0, 1, 2], 33), ([2], 9)])
def test_hnet_is_blind_to_padding(stages, gap, rows, length):
    model = hnet(stages, gap)
    z, mask = noise(3, 24, 5), masked([24, 15, 9], 24)
    other, other_mask = noise(3, 33, 5, seed=1), masked([24, 15, 9], length)[rows]
    other[:, :24][mask] = z[mask]

    before, routings = model(z, mask)
    after, others = model(other[rows, :length], other_mask)

    torch.testing.assert_close(before[rows][mask[rows]], after[other_mask], rtol=1e-4, atol=1e-4)
    for a, b in zip(routings, others, strict=True):
        assert torch.equal(a.boundary[rows][a.mask[rows]], b.boundary[b.mask])
        assert not b.boundary[~b.mask].any()


@pytest.mark.parametrize("still", [False, True])
def test_reconstruction_compares_the_frame_drawn_with_the_predicted_latent(dataset, still):
    model, rows, mask = randomised(lam.LAM(LAM, 16)), np.arange(6, 12)[None], masked([3], 6)
    z, scale = noise(1, 6, 4).requires_grad_(), [(torch.full((4,), 0.5), 2.0)]
    if still:
        dataset.frames = np.full_like(dataset.frames, 100)

    loss = skills.reconstruction(model, z, mask, rows, [dataset], scale, np.random.default_rng(0))

    loss.backward()
    now, true = (model.frames(dataset, rows[0, 1:3] + gap, "cpu") for gap in (0, 4))
    error = (model.fdm(now, 2 * z[0, :2] + 0.5) - true).square().sum()
    copying = 0.1 if still else (now - true).square().sum()
    assert loss.item() == pytest.approx((error / copying).item(), rel=1e-4)
    assert z.grad[0, :2].abs().min() > 0 and z.grad[0, 2:].abs().max() == 0


@HNETS
def test_skills_at_frame_rate_equal_the_loop_over_each_episode_alone(stages, gap):
    model = hnet(stages, gap)
    dataset = SimpleNamespace(name="set", start=np.array([0, 30]), length=np.array([30, 17]))
    z = noise(47, 5)

    boundaries, *vectors = skills.segment(model, dataset, z.numpy(), gap, "cpu")

    for rows, length in ((slice(0, 30), 30), (slice(30, 47), 17)):
        known = length - gap
        _, routings = model(z[rows][None, :known], masked([known], known))
        frames = np.arange(known)  # at which the stage has a position
        for s, routing in enumerate(routings):
            position = np.searchsorted(frames, np.arange(length), side="right") - 1
            assert np.allclose(vectors[s][rows], routing.vectors[0, position], atol=1e-4)
            frames = frames[routing.boundary[0].numpy()]
            assert np.flatnonzero(boundaries[rows, s]).tolist() == frames.tolist()


@pytest.mark.parametrize("rule", ["first", "plan"])
def test_skill_is_the_first_vector_or_what_is_ahead_in_this_segment_and_the_next(rule):
    first = [0, 0, 0, 3, 4, 4, 4, 4, 8, 8]  # at the segment's first frame
    ahead = [1, 1.5, 2, 3, 5.5, 6, 6.5, 7, 8.5, 9]  # the mean from here to the segment's end
    after = [3, 3, 3, 3, 8.5, 8.5, 8.5, 8.5, 9, 9]  # of the next; in the last one its last frame
    vectors, last = np.arange(10.0)[:, None], np.repeat([3, 9], [4, 6])  # two episodes

    found = skills.skill_vectors(vectors, np.isin(np.arange(10), [0, 3, 4, 8]), rule, last)

    expected = {"first": [first], "plan": [ahead, after]}
    assert found.T.tolist() == expected[rule]


@pytest.mark.parametrize("numbers, moving", [(1, 1), (3, 2)])
def test_way_to_a_segments_end_is_that_of_all_numbers_but_the_gripper(dataset, numbers, moving):
    dataset.actions = noise(19, numbers).numpy()
    boundary = np.isin(np.arange(19), [0, 6, 9, 15])
    way, _ = skills.sum_ahead(dataset.actions[:, :moving], boundary)

    _, found = skills.skill_r2(dataset, 1000 * way, boundary)

    assert len(found) == moving and min(found) > 0.9


def test_uniform_boundaries_are_as_many_in_each_episode_and_evenly_spread():
    boundary = np.isin(np.arange(29), [0, 1, 2, 3, 20, 28])

    uniform = np.flatnonzero(skills.uniform_boundaries(boundary, [0, 20], [20, 9]))

    assert uniform.tolist() == [0, 5, 10, 15, 20, 24]


def test_events_are_the_middles_of_grasps_and_releases_and_other_changes():
    names = [b"reach", b"grasp", b"carry", b"reach", b"release", b"reach"]

    found = skills.events(np.repeat(names, [4, 3, 5, 6, 5, 2]))

    assert found.tolist() == [5, 12, 20]  # middle of grasp; carry to reach; middle of release
    assert len(skills.events(np.array([], bytes))) == 0


def test_f1_score_matches_as_many_boundaries_as_can_be():
    found = [np.array([4, 6, 30]), np.array([9])]
    true = [np.array([6, 8]), np.array([12])]  # 4 must take 6, and leave 8 to 6

    assert skills.f1_score(found, true) == pytest.approx(2 * 2 / (4 + 3), abs=1e-4)


def test_peaks_are_the_highest_changes_of_direction():
    angle = np.array([0, 0.1, 1.5, 1.6, 1.7, 2.5, 2.6, 2.7, 2.9, 3.0])
    z = np.stack([np.cos(angle), np.sin(angle)], axis=1)

    assert skills.peaks(z, 2).tolist() == [2, 5]


# ---------------------------------------------------------------------------- latent action model
def test_odd_half_of_a_latent_changes_sign_under_time_reversal():
    torch.manual_seed(0)
    idm, (a, b) = lam.IDM(6, 32, 8, 8, True), torch.rand(2, 3, 6, 32, 32)

    forward, backward = idm(a, b), idm(b, a)

    torch.testing.assert_close(forward[:, :4], -backward[:, :4], rtol=0, atol=1e-5)
    assert forward[:, :4].abs().max() > 1e-3
    assert (forward + backward)[:, 4:].abs().max() > 0.1


@pytest.mark.parametrize("amount, least, most", [(0.4, 0.05, 1), (1e-6, 0, 1e-4)])
def test_warp_moves_both_frames_alike_by_its_strength(amount, least, most):
    frames = noise(3, 6, 32, 32)

    now, future = lam.warp([frames, frames], amount)

    assert torch.equal(now, future)
    assert least <= (now - frames).abs().mean() <= most


@pytest.mark.parametrize("reverse, steps", [(False, [4] * 8), (True, [4, -4] * 4)])
def test_get_batch_pairs_frames_k_apart_and_every_other_backwards(dataset, reverse, steps):
    rows, rng, model = dataset.rows([0, 1], 4), np.random.default_rng(0), lam.LAM(LAM, 16)

    pair = lam.get_batch(model, [dataset], [rows], 8, reverse, rng, "cpu")

    now, future = ((255 * frames[:, 0, 0, 0]).round() for frames in pair)  # a pixel is its row
    assert (future - now).tolist() == steps
    assert set(torch.minimum(now, future).tolist()) <= {0, 1, 6, 7, 8, 9, 10}


def test_encode_writes_latents_where_there_is_a_frame_t_plus_k_and_zeros_elsewhere(dataset):
    model, rng = lam.LAM(LAM, 16), np.random.default_rng(0)
    dataset.frames = rng.integers(0, 256, dataset.frames.shape, np.uint8)

    latents = lam.encode(model, dataset, "cpu")

    assert np.flatnonzero(latents.any(1)).tolist() == [0, 1, 6, 7, 8, 9, 10]
    frames = model.frames(dataset, np.array([7, 11]), "cpu")
    assert np.allclose(latents[7], model.idm(frames[:1], frames[1:])[0].detach(), atol=1e-5)


def test_probe_of_a_single_held_out_row_has_no_r2():
    x = noise(9, 3).numpy()

    assert np.isnan(lam.ridge(x, x[:, :1], x[:1], x[:1, :1])).all()


def test_probe_reads_the_action_from_true_motion_and_nothing_from_chance(trained):
    robot = data.Packed(trained / "data/toy/robot")
    motion, chance = np.diff(robot.proprio, axis=0, append=0), noise(robot.total, 8).numpy()

    known, unknown = lam.probe([robot], [motion], 1), lam.probe([robot], [chance], 1)

    assert min(*known["action_r2"][:2], known["gripper_f1"]) > 0.9
    assert max(*unknown["action_r2"], unknown["gripper_f1"]) < 0.3


# ----------------------------------------------------------------------------------------- policy
def test_targets_of_a_chunk_are_the_next_rows_that_have_one_in_the_episode(dataset):
    arrays = {"target": dataset.actions}
    labels = policy.Labels(dataset, [0, 3, 4, 13], 1, 1, arrays)  # gap 1, one camera

    batch = policy.get_batch([labels], 50, 4, np.random.default_rng(0), "cpu")

    pairs = zip(batch["target"][:, :, 0], batch["mask"], strict=True)
    assert {tuple(t[m].tolist()) for t, m in pairs} == {(0, 1, 2, 3), (3, 4), (4,), (13,)}


def test_what_lies_past_the_episodes_end_is_not_learned():
    flat, mask, images = agent(0), masked([4, 2], POLICY["chunk"]), noise(2, 1, 3, 32, 32)
    tokens = torch.stack([policy.tokenize("put it down")] * 2)
    prediction = flat.predict(images, tokens, None)
    target = torch.where(mask[..., None], prediction + 0.5, 1e6)

    losses = flat(images, tokens, target, mask)

    assert losses["action"].item() == pytest.approx(0.5 * mask.float().mean().item())


@pytest.mark.parametrize("skill, low_text, heard", [(8, 0, False), (8, 1, True), (0, 0, True)])
def test_low_level_is_told_the_text_if_it_is_flat_or_asked_for(skill, low_text, heard):
    level, vector = agent(skill, low_text), noise(1, skill) if skill else None
    sentences = ["put the red block on the white tray", "put the blue block on the white tray"]
    tokens = [policy.tokenize(sentence)[None] for sentence in sentences]

    a, b = [level.predict(noise(1, 1, 3, 32, 32), t, vector, torch.zeros(1, 3)) for t in tokens]

    assert torch.equal(a, b) == (not heard)


@pytest.mark.parametrize("more, heard", [(0.2, False), (0.4, True)])
def test_low_level_is_told_the_skill_in_whole_deviations(more, heard):
    level, tokens, images = agent(8), policy.tokenize("push")[None], noise(1, 1, 3, 32, 32)
    skill = torch.tensor([[-2, -1, 0, 0, 1, 1, 2, 1.2]])

    a, b = [level.predict(images, tokens, x, torch.zeros(1, 3)) for x in (skill, skill + more)]

    assert torch.equal(a, b) == (not heard)


def test_fine_tuning_leaves_the_high_level_exactly_as_it_was_and_changes_the_low_level(trained):
    before, after = (torch.load(trained / f"{stem}.pt")["model"] for stem in list(STAGES)[2:])

    changed = {key for key in after if not torch.equal(before[key], after[key])}

    assert not any(key.startswith("high") for key in changed)
    assert any(key.startswith("high") for key in after)
    assert "low.image.conv.0.conv.weight" in changed


@pytest.mark.parametrize(
    "demos, tasks, chosen",
    [(2, None, [0, 1, 2, 3, 4, 5]), (0.5, None, [0, 1, 2, 4]), (1, [2], [1]), (2, [0], [2, 5])],
)
def test_labelled_episodes_are_the_first_of_each_task(demos, tasks, chosen):
    episodes = [{"task": name} for name in ("9", "10", "2", "10", "9", "2", "held out", "9")]
    train = np.array([0, 1, 2, 3, 4, 5, 7])
    dataset = SimpleNamespace(name="set", episodes=episodes, split=lambda name: train)

    assert policy.labelled_episodes(dataset, demos, tasks).tolist() == chosen


@pytest.mark.parametrize("told, layers", [(None, 1), (3 * noise(4, 8, seed=1), 0)])
def test_act_standardises_what_it_is_given_and_undoes_it_for_the_actions(told, layers):
    acting, texts = agent(8, layers=layers, cameras=2), ["push", "pull", "lift", "turn"]
    for name in ("proprio", "target", "skill"):
        acting.set_scale(name, np.full(acting.shape[name], 0.5), np.full(acting.shape[name], 3.0))
    views = np.random.default_rng(0).integers(0, 256, (2, 4, 32, 32, 3), np.uint8)
    proprio = noise(4, 3)

    actions = acting.act(*views, proprio.numpy(), texts, None if told is None else told.numpy())

    images = torch.from_numpy(views).permute(1, 0, 4, 2, 3) / 255
    tokens = torch.stack([policy.tokenize(text) for text in texts])
    skill = acting.high(images, tokens) if told is None else (told - 0.5) / 3
    expected = acting.low(images, tokens, skill.round(), (proprio - 0.5) / 3).clamp(-1, 1)
    np.testing.assert_allclose(actions.reshape(4, -1), 3 * expected + 0.5, atol=1e-4)


@pytest.mark.parametrize("frames", [np.zeros((1, 32, 32, 3)), np.zeros((1, 48, 48, 3), np.uint8)])
def test_act_refuses_images_unlike_the_packed_ones(frames):
    with pytest.raises(ValueError, match="uint8"):
        agent(0).act(frames, None, np.zeros((1, 3)), ["push"])


def test_sentences_that_differ_in_case_and_punctuation_are_one_and_in_order_are_two():
    same, other = policy.tokenize("Put A, then B!"), policy.tokenize("put b then a")

    assert torch.equal(policy.tokenize("put a then b"), same) and not torch.equal(same, other)


def test_in_pretraining_the_low_level_is_told_what_the_high_level_says_and_teaches_it_nothing():
    level = agent(8).requires_grad_(True)
    images, target, true = noise(2, 1, 3, 32, 32), noise(2, 4, 3), noise(2, 8, seed=2)
    tokens = torch.stack([policy.tokenize(text) for text in ("push", "pull")])
    said = level.predict_skill(images, tokens)

    losses = level(images, tokens, target, masked([4, 4], 4), None, true)

    losses["action"].backward()
    assert not torch.equal(said, level.predict_skill(images, tokens.flip(0)))  # it hears the text
    assert losses["skill"].item() == pytest.approx((said - true).abs().mean().item())
    expected = (level.predict(images, tokens, said) - target).abs().mean()
    assert losses["action"].item() == pytest.approx(expected.item())
    assert all(p.grad is None or not p.grad.any() for p in level.high.parameters())


# ------------------------------------------------------------------------------------------- data
@pytest.mark.parametrize("goal", data.TASKS)
def test_toy_demonstration_replayed_puts_the_blocks_where_the_text_says(goal):
    arrays = data.toy_demonstrate("robot", goal, [5, 0])
    world, words = data.ToyWorld([goal], [[5, 0]]), data.toy_text(goal).split()

    for frame, action in zip(arrays["frames"], arrays["actions"], strict=True):
        assert np.array_equal(world.frames([0])[0], frame)
        success = world.step(action[None])[0]

    assert success and len(arrays["actions"]) < eval_libero.LIMITS["toy"]
    place = dict(zip([*data.BLOCKS, *data.TRAYS], world.objects[0], strict=True))
    for block, tray in ((words[2], words[6]), (words[10], words[14])):
        assert np.abs(place[block] - place[tray]).max() < data.TRAY_HALF


@pytest.mark.parametrize("runs", [1, 2])
def test_packing_starts_anew_after_a_kill_and_only_once_where_two_run(runs):
    data.pack_toy("alone", 4, 1)
    Path("toy/hand.part").mkdir(parents=True)
    Path("toy/hand.part/frames.bin").write_bytes(b"left over")

    with ProcessPoolExecutor(runs) as pool:
        packing = [pool.submit(data.pack_toy, "toy", 4, 1) for _ in range(runs)]

    assert [run.exception() for run in packing] == [None] * runs
    assert contents(Path("toy")) == contents(Path("alone"))


@pytest.mark.parametrize(
    "split, change, message",
    [
        ("training", {}, "neither train nor val"),
        ("val", {"proprio": np.zeros((4, 0), np.float32)}, "actions float32"),
        ("val", {"wrist": np.zeros((4, 16, 16, 3), np.uint8)}, "not as before"),
        ("val", {"frames": np.zeros((4, 16, 16, 3), np.float32)}, "wrist uint8"),
        ("val", {"frames": np.zeros((4, 16, 12, 3), np.uint8)}, "wrist uint8"),
        ("val", {"frames": np.zeros((0, 16, 16, 3), np.uint8)}, "0 frames"),
        ("val", {"action": np.zeros((4, 2), np.float32)}, "proprio, actions"),
        ("val", {"proprio": np.zeros((4, 2))}, "actions float32"),
        ("val", {"actions": np.zeros(4, np.float32)}, "actions float32"),
        ("val", {"actions": np.zeros((3, 2), np.float32)}, "beside 4 frames"),
    ],
)
def test_episode_unlike_what_the_stages_expect_is_not_packed(capsys, split, change, message):
    good = {"frames": np.zeros((4, 16, 16, 3), np.uint8)}
    good |= {"proprio": np.zeros((4, 2), np.float32), "actions": np.zeros((4, 2), np.float32)}

    with pytest.raises(SystemExit):
        data.pack("set", [("", "a", "train", good), ("", "a", split, good | change)])

    assert message in capsys.readouterr().err and not Path("set").exists()


@pytest.mark.parametrize("name, content", [("a.npy", np.eye(50)), ("a.pt", torch.eye(50))])
def test_file_for_which_there_is_no_room_leaves_the_old_one(tmp_path, capsys, name, content):
    resource = pytest.importorskip("resource")
    data.write(name, content[:1])
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))

    with pytest.raises(SystemExit):
        data.write(name, content)

    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path) == before and "stays as it was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, path",
    [(skills, "data/toy/robot"), (skills, "out/toy/skills.pt"), (eval_libero, RECORDS)],
)
def test_file_that_another_process_writes_is_refused(folder, capsys, script, path):
    os.rename(path, "away")

    with ProcessPoolExecutor(1, None, data.claim, [Path(path)]) as pool:
        pid = pool.submit(os.getpid).result()  # once it has claimed the file
        with pytest.raises(SystemExit):
            run(script)

    assert f"process {pid} is writing {path}" in capsys.readouterr().err


def write_libero(text="put a bowl on the stove", lengths=(5,) * 12, **change):
    """A file in raw of demonstrations of these lengths in LIBERO's schema, all numbers of
    frame j of demonstration i made of 10 i + j. change: other arrays, None to leave one out."""
    h5py, path = pytest.importorskip("h5py"), Path(f"raw/{text.replace(' ', '_')}_demo.hdf5")
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        problem = json.dumps({"language_instruction": text})
        file.create_group("data").attrs["problem_info"] = problem
        for i, length in enumerate(lengths):
            t = 10.0 * i + np.arange(length)[:, None]
            image = np.tile(t[..., None, None], (1, 16, 16, 3)).astype(np.uint8)
            image[:, 15] = 255  # the last row, which is the topmost: LIBERO's are upside down
            arrays = {"obs/agentview_rgb": image, "obs/eye_in_hand_rgb": 255 - image}
            arrays |= {"obs/joint_states": np.tile(t, 7), "obs/gripper_states": np.tile(-t, 2)}
            arrays["actions"] = np.tile(t, 7)
            for name, array in (arrays | change).items():
                if array is not None:
                    file[f"data/demo_{i}/{name}"] = array
    return path


def test_libero_import_pairs_a_frame_with_the_action_after_it():
    write_libero()

    run(data, "libero")

    packed = data.Packed("set")
    assert packed.length.tolist() == [4] * 12 and packed.split("val").tolist() == [11]
    assert {episode["text"] for episode in packed.episodes} == {"put a bowl on the stove"}
    t = np.concatenate([10 * i + np.arange(4) for i in range(12)])[:, None]  # demo_10 after demo_9
    assert np.all(packed.frames[:, 0] == 255) and np.all(packed.frames[:, 1:] == t[..., None, None])
    assert np.all(packed.wrist == 255 - packed.frames)
    assert np.all(packed.actions == t + 1)
    assert np.all(packed.proprio == t * ([1] * 7 + [-1] * 2))


def test_libero_files_and_demonstrations_with_nothing_to_learn_are_named(capsys):
    write_libero(" ")  # no sentence
    write_libero("lift", [])  # no demonstrations
    write_libero("push", [5, 2, 5])

    run(data, "libero")

    skipped = Path("set/skipped.txt").read_text().splitlines()
    names = ["__demo.hdf5", "lift_demo.hdf5", "push_demo.hdf5 demo_1"]
    assert [line.split(":")[0] for line in skipped] == names
    assert data.Packed("set").length.tolist() == [4, 4]
    assert "49 numbers of actions lie beyond [-1, 1]" in capsys.readouterr().out


def write_clip(path, width=32, fps=10, upright=False):
    """A video of 12 frames, 32 pixels high, grey but for a white left edge, an eighth of it;
    upright: marked as filmed with the camera upright, to be turned clockwise by 90 degrees."""
    av = pytest.importorskip("av")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as video:
        stream = video.add_stream("mpeg4", fps, width=width, height=32, pix_fmt="yuv420p")
        for grey in GREYS:
            image = Image.new("RGB", (width, 32), (grey,) * 3)
            image.paste((255, 255, 255), (0, 0, width // 8, 32))
            video.mux(stream.encode(av.VideoFrame.from_image(image)))
        video.mux(stream.encode())
    if upright:
        film = bytearray(Path(path).read_bytes())
        at = film.find(b"tkhd") + 44
        turn = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4")
        film[at : at + 36] = turn.tobytes()
        Path(path).write_bytes(film)


def write_images(folder, ending, greys=GREYS, mode="L"):
    """Grey images in a folder, whose names do not sort like their numbers."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for i, grey in enumerate(greys):
        Image.new(mode, (32 + i, 32), grey).save(f"{folder}/frame{i}{ending}")


@pytest.mark.parametrize("name", CAPTIONS)
def test_clips_are_read_from_any_depth_in_order_and_with_their_captions(name):
    write_images("raw/1", ".bmp")
    write_images("raw/b/c/d", ".png")
    for clip in ("b/2.MKV", "b/10.mov", "b/c/film.avi", "e.mpg"):
        write_clip(f"raw/{clip}")
    write_images("raw/b", ".jpg")  # thumbnails of the videos there are no clip
    Path(name).write_text(CAPTIONS[name], encoding="utf-8-sig")  # with a byte order mark

    run(data, "video", "--workers", 2, "--labels", name)

    packed = data.Packed("set")
    episodes = [(episode["task"], episode["text"]) for episode in packed.episodes]
    assert episodes[:3] == [("1", "hold a pen"), ("b/2", "push; a cup"), ("b/10", "")]
    assert episodes[3:] == [("b/c/d", ""), ("b/c/film", ""), ("e", "")]
    assert packed.frames[:, 8, 8, 0].astype(int) == pytest.approx(np.tile(GREYS, 6), abs=6)


@pytest.mark.parametrize(
    "clip, words, greys, white",
    [
        ({"width": 64}, ["--fit", "crop"], GREYS, np.s_[:, :0]),
        ({"width": 64}, ["--fit", "squash"], GREYS, np.s_[:, :2]),
        ({"upright": True}, ["--src", "raw/clip.mp4"], GREYS, np.s_[:2, :]),
        ({}, ["--fps", 5], GREYS[::2], np.s_[:, :2]),
        ({}, ["--fps", 20], np.repeat(GREYS, 2)[1:], np.s_[:, :2]),
    ],
    ids=["its middle", "squeezed", "turned upright", "at half the rate", "at twice the rate"],
)
def test_clip_is_packed_square_upright_and_at_its_rate(clip, words, greys, white):
    write_clip("raw/clip.mp4", **clip)

    run(data, "video", *words)

    packed = data.Packed("set")
    expected = np.zeros((16, 16), bool)
    expected[white] = True
    assert packed.episodes[0]["task"] == "clip"
    assert np.array_equal(packed.frames[0, :, :, 0] > 128, expected)
    assert packed.frames[:, 8, 8, 0].astype(int) == pytest.approx(greys, abs=6)


def test_clips_that_cannot_be_read_or_compared_are_named(capsys):
    for name, fps in (("good.mp4", 10), ("half.mkv", 2), ("bad.mp4", 2)):
        write_clip(f"raw/{name}", fps=fps)
    os.truncate("raw/bad.mp4", 900)
    os.truncate("raw/half.mkv", 2 * os.path.getsize("raw/half.mkv") // 3)
    write_images("raw/still", ".png", GREYS[:1])
    write_images("raw/deep", ".png", GREYS, "I;16")  # 16 bits a colour
    os.symlink("still", "raw/link")

    run(data, "video")

    packed = data.Packed("set")
    assert [episode["task"] for episode in packed.episodes] == ["good", "half"]
    assert packed.length[0] == 12 and 1 < packed.length[1] < 12
    skipped = Path("set/skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in skipped] == ["raw/link", "bad", "deep", "half", "still"]
    printed = capsys.readouterr().out
    assert "5 problems" in printed and "[2, 10] frames a second are mixed" in printed


# ------------------------------------------------------------------------- training and resuming
@pytest.mark.parametrize("stem", STAGES)
def test_training_again_gives_the_same_numbers(trained, folder, monkeypatch, stem):
    os.remove(f"{stem}.pt")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # in the third step
        patch.setattr(data, "stop_unless_finite", Mock(side_effect=[0, 0, KeyboardInterrupt]))
        run(STAGES[stem])
    assert torch.load(f"{stem}.pt")["step"] == 2

    run(STAGES[stem])

    assert_same(folder, trained)


@pytest.mark.parametrize("stem", STAGES)
def test_log_is_written_as_a_table_and_drawn(trained, stem):
    log = torch.load(trained / f"{stem}.pt")["log"]

    header, *lines = (trained / f"{stem}_log.csv").read_text().splitlines()
    picture = Image.open(trained / f"{stem}_log.png").convert("L")

    assert [row["step"] for row in log] == [2, 4] and header == ",".join(log[0])
    for line, row in zip(lines, log, strict=True):
        assert list(map(float, line.split(","))) == pytest.approx(list(row.values()), rel=1e-4)
    assert np.ptp(picture) > 50


def test_training_reads_no_held_out_row_and_no_truth(trained, folder):
    for path in map(Path, data.TOY_SETS):
        dataset = data.Packed(path)
        held_out = dataset.rows(dataset.split("val"))
        for name, kind in dataset.arrays.items():
            array = np.memmap(path / f"{name}.bin", kind["dtype"], "r+")
            array = array.reshape(dataset.total, *kind["shape"])
            array[held_out] = array[0]
            if name.startswith("truth"):
                array[:] = array[0]
    shutil.rmtree("out")

    for script in (lam, skills, policy):
        run(script)

    for stem in STAGES:
        before, after = (torch.load(run / f"{stem}.pt")["model"] for run in (trained, folder))
        torch.testing.assert_close(before, after, rtol=0, atol=0)


def test_fdm_learns_to_draw_with_the_true_latent_and_not_with_another(folder):
    run(lam, "--out", "new", "--steps", 60, "--batch", 32, "--width", 16)

    figures = json.loads(Path("new/lam.json").read_text())
    assert figures["fdm_error"] < 0.9 < figures["fdm_error_shuffled"]


def test_loss_of_stage_2_is_the_sum_of_its_weighted_parts(folder, monkeypatch):
    os.remove("out/toy/skills.pt")
    forward = skills.HNet.forward

    def oracle(model, z, mask):  # it predicts the next latents as they are
        prediction, routings = forward(model, z, mask)
        return 0 * prediction + z.roll(-1, 1), routings

    monkeypatch.setattr(skills.HNet, "forward", oracle)
    run(skills, "--steps", 1, "--rec", 0.5, "--ratio", 0.3)

    [row] = torch.load("out/toy/skills.pt")["log"]
    expected = 0.5 * row["L_rec"]
    for f, g, n in ((row["F_z1"], row["G_z1"], 15), (row["F_z2"], row["G_z2"], 3)):
        expected += 0.3 * n / (n - 1) * ((n - 1) * f * g + (1 - f) * (1 - g))
    assert row["L_latent"] < 1e-6 and row["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("script", [lam, policy])
def test_two_processes_train_like_one_with_twice_the_batch(trained, folder, script):
    paths = [f"{stem}.pt" for stem in STAGES if STAGES[stem] is script]
    for path in paths:
        os.remove(path)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script.__file__]

    python([*launch, *TINY[script], "--batch", 4])

    for path in paths:
        one, two = (torch.load(run / path)["optimizer"]["state"] for run in (trained, folder))
        for key in one:  # Adam's mean of the gradients
            a, b = one[key]["exp_avg"], two[key]["exp_avg"]
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("execute", [1, 3, 4])
def test_ensemble_equals_the_loop(execute):
    past, chunks = np.zeros((2, 4, 4)), noise(7, 2, 4, 3).numpy()  # 7 decisions in 2 episodes
    for d, chunk in enumerate(chunks):
        found, past = eval_libero.ensemble(past, chunk, execute)

        for n in range(execute):
            step = d * execute + n
            told = [e for e in range(d + 1) if step - e * execute < 4]  # decisions about this step
            predicted = [chunks[e, :, step - e * execute] for e in told]
            weights = [np.exp(-0.01 * e * execute) for e in told]  # older ones weigh more
            assert np.allclose(found[:, n], np.average(predicted, 0, weights), atol=1e-5)


def test_gripper_holds_the_last_clear_command_for_as_many_steps_as_are_left():
    scene = SimpleNamespace(grip=-1, steps=np.array([0]), success=np.array([False]))
    scene.args = SimpleNamespace(clear=0.5, max_steps=5)
    scene.step = Mock(side_effect=len)

    for commands in ([0.4, 0.6, -0.4], [-0.6, 0.2, 0.9]):
        eval_libero.LiberoEpisode.execute(scene, [0], np.reshape(commands, (1, 3, 1)))

    taken = [action[-1] for call in scene.step.call_args_list for action in call.args[0]]
    assert taken == [-1, 0.6, 0.6, -0.6, -0.6]
    assert scene.steps.tolist() == [5] and scene.alive.tolist() == [False]


def test_interrupted_evaluation_goes_on_and_counts_a_success_at_once(folder, monkeypatch):
    log = Path(RECORDS)
    first, second, _ = log.read_text().splitlines(keepends=True)
    log.write_text(first + second.replace('"seed": 0', '"seed": 1'))  # and one of another seed
    step, goal = data.ToyWorld.step, data.TASKS[5]
    monkeypatch.setattr(data.ToyWorld, "step", lambda w, a: step(w, a) | (w.goals != goal).any(1))

    run(eval_libero)

    records = [json.loads(line) for line in log.read_text().splitlines()]
    found = [(record["task"], record["success"], record["steps"]) for record in records]
    assert found[:2] == [(0, False, 6), (3, False, 6)]  # the first is not repeated
    assert found[2:] == [(3, True, 1), (5, False, 6)]
    report = json.loads(log.with_suffix(".json").read_text())
    assert (report["wins"], report["ci95"]) == (1, [0.0615, 0.7923])  # Wilson's interval


def test_skills_read_in_a_video_are_those_of_the_same_video_in_the_packed_set(folder):
    sets = [data.Packed(path) for path in data.TOY_SETS]
    jobs = [3, 8]  # videos of the hand
    goals = [data.GOALS[int(sets[0].episodes[i]["task"])] for i in jobs]
    episodes = SimpleNamespace(seeds=[[0, i] for i in jobs], limit=120)
    acting = policy.load_agent("out/toy", "hilam", 1, "cpu")

    prompts = eval_libero.read_prompts(episodes, goals, "out/toy", acting, "cpu")

    skill = np.load("out/toy/skills1.hand.npy")
    for i, found in zip(jobs, prompts, strict=True):
        known = skill[sets[0].rows([i])]
        np.testing.assert_allclose(found[: len(known)], known, atol=1e-3)
        np.testing.assert_allclose(found[len(known) :], [known[-1]] * (120 - len(known)), atol=1e-3)


def test_success_is_pooled_over_run_folders_and_1_demonstration_is_not_a_share_of_1(capsys):
    runs = [eval_libero.rate(wins, 10) | {"variant": "flat"} for wins in (2, 4, 9)]
    reports = [run | {"demos": demos} for run, demos in zip(runs, (1, 1, 1.0), strict=True)]

    eval_libero.summarise(reports, "toy", "success.png")

    _, few, every = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert few[1:3] + few[-3:] == ["1", "0.30", "20", "0.20", "0.40"]
    assert every[1:3] + every[-2:] == ["1.0", "0.90", "10", "0.90"]


def fake_play(task, episode, folder):
    """An episode that dies in its first try if its number is 7, fails if 8, and hangs if 9."""
    tried = Path(folder, str(episode))
    if episode == 7 and not tried.exists():
        tried.touch()
        os._exit(9)
    if episode == 8:
        raise ValueError("it fails")
    time.sleep(60 * (episode == 9))
    return True, 5, []


def test_episode_whose_worker_dies_is_played_again(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_libero, "play", fake_play)

    ended = list(eval_libero.play_libero([(3, 6), (3, 7), (3, 0)], 1, tmp_path))

    assert sorted(ended) == [(i, True, 5, []) for i in range(3)]


@pytest.mark.parametrize("episode, problem", [(8, "ValueError it fails"), (9, "TimeoutError")])
def test_episode_that_fails_again_is_named(tmp_path, monkeypatch, capsys, episode, problem):
    monkeypatch.setattr(eval_libero, "play", fake_play)
    monkeypatch.setattr(eval_libero, "TIMEOUT", 1)

    with pytest.raises(SystemExit):
        list(eval_libero.play_libero([(3, episode)], 1, tmp_path))

    assert f"task 3, episode {episode}, tried twice: {problem}" in capsys.readouterr().err


@pytest.fixture
def libero(monkeypatch):
    """LIBERO's own environment of the first task of libero_object, and its initial states."""
    package = pytest.importorskip("libero")
    if not Path(package.__path__[0], "libero/assets/scenes").exists():
        pytest.skip("LIBERO's assets are not installed")
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")  # so that it is put back
    eval_libero.prepare_libero(".")
    from libero.libero import benchmark, envs

    suite = benchmark.get_benchmark("libero_object")()
    env = envs.OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(0))
    yield env, suite.get_task_init_states(0)
    env.close()


def test_libero_observations_are_those_of_the_official_loop(libero):
    env, states = libero
    args = SimpleNamespace(suite="libero_object", seed=0, clear=0, max_steps=6, replay=None)
    acting = agent(0, cameras=2, proprio=9, target=7)
    act = acting.act
    acting.act = Mock(wraps=act)

    for episode in (0, 1):
        [outcome] = eval_libero.rollout(eval_libero.LiberoEpisode(0, episode, args, 32), acting, 4)
        assert outcome[:3] == (0, False, 6)

    decisions = [call.args for call in acting.act.call_args_list]
    assert len(decisions) == 4  # two in each episode
    for i, (frames, wrist, proprio, texts, _) in enumerate(decisions):
        if i in (0, 2):
            env.seed(0)
            env.reset()
            env.set_init_state(states[i // 2])
            actions = [[0, 0, 0, 0, 0, 0, -1.0]] * 10
        true = [env.step(action)[0] for action in actions][-1]
        for ours, camera in ((frames, "agentview"), (wrist, "robot0_eye_in_hand")):
            expected = data.resize(true[f"{camera}_image"][None, ::-1], 32).astype(float)
            assert expected.std() > 5 and np.abs(ours - expected).mean() < 0.2
        body = [*true["robot0_joint_pos"], *true["robot0_gripper_qpos"]]
        assert np.allclose(proprio[0], body, atol=1e-5) and texts == [env.language_instruction]
        actions = act(frames, wrist, proprio, texts)[0]


def test_libero_demonstration_is_replayed_from_its_own_state(libero):
    h5py, (env, states) = pytest.importorskip("h5py"), libero
    with h5py.File("task_demo.hdf5", "w") as file:
        for i in (1, 10, 2):  # the last in number is demo_10
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs["model_file"] = env.env.sim.model.get_xml()
            demo["states"], demo["actions"] = states[i : i + 1], np.full((12, 7), i)

    actions = eval_libero.set_demonstration(env, "task_demo.hdf5", 2)

    assert np.allclose(env.get_sim_state(), states[10]) and (actions == 10).all()


def test_libero_is_evaluated_in_workers_and_reported(libero):
    write_libero(actions=np.linspace(-1, 1, 35).reshape(5, 7))
    run(data, "libero", "--size", 32)
    run(policy, "--data", "set", "--out", ".", "--variant", "flat")

    run(eval_libero, "--suite", "libero_object", "--out", ".", "--tasks", 0, "--variant", "flat")

    report = json.loads(Path("eval_libero_object_flat_1_tasks0.json").read_text())
    assert (report["wins"], report["episodes"]) == (0, 1)
    assert Image.open("eval_libero_object_flat_1_tasks0_task0_failure.gif").n_frames == 1


# -------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    "damage, script, words, message",
    [
        (None, lam, ["--data", "nowhere"], "nowhere is no packed dataset"),
        (lambda: os.remove(FRAMES), lam, [], "frames.bin is missing"),
        (None, lam, ["--width", 12], "in steps of 8"),
        (None, lam, ["--latent", 1], "--latent"),
        (None, lam, ["--seed", -1], "--seed"),
        (None, lam, ["--wrist"], "not all of the sets have a wrist camera"),
        (None, lam, ["--gap", 500], "--gap 500 is longer than all episodes"),
        (None, lam, ["--lr", "inf"], "--lr"),
        (None, lam, ["--lr", 1e30, "--out", "new"], "the gradient is"),
        (None, lam, ["--device", "cuda:99"], "--device cuda:99"),
        (None, skills, ["--chunk", 1, 3], "--chunk"),
        (None, skills, ["--chunk", 4, 3], "--chunk 4 is below --least"),
        (None, data, ["libero", "--src", "nowhere"], "no .hdf5"),
        (None, data, ["libero", "--src", "data", "--demos", -3], "--demos"),
        (None, data, ["video", "--src", "data", "--val", 0.7], "--val"),
        (None, data, ["video", "--src", "data"], "no .mp4"),
        (None, policy, ["--patch", 5], "--patch 5"),
        (None, policy, ["--demos", 1.5], "1.5 is not from 1e-06 to 1"),
        (lambda: os.remove(PRETRAINED), policy, ["--demos", 99], "--demos 99: task"),
        (None, policy, ["--variant", "flat", "--tasks", 10], "there are 10 tasks"),
        (None, eval_libero, ["--variant", "flat", "--prompt", "video"], "has not learned"),
        (None, eval_libero, ["--demos", 7], "policy_hilam_7.pt"),
        (None, eval_libero, ["--suite", "libero_object"], "pip install"),
        (lambda: shutil.copy(FIRST, "out/toy/skills.pt"), skills, [], "not of skills"),
        (lambda: torch.save(torch.load(FIRST) | {"model": {}}, FIRST), lam, [], "another shape"),
        (lambda: os.truncate(FIRST, 3000), lam, [], "missing or damaged"),
        (lambda: torch.save(torch.load(FIRST) | {"step": 2}, FIRST), skills, [], "step 2 of 4"),
        (lambda: os.environ.update(WORLD_SIZE="2"), skills, [], "one process"),
        (lambda: os.remove(LATENTS), skills, [], "run `python lam.py`"),
        (lambda: os.truncate(LATENTS, 999), skills, [], "run `python lam.py`"),
        (lambda: np.save(LATENTS, np.load(LATENTS) + 1), policy, [], "made from other latents"),
        (lambda: replace_bytes(FRAMES, b"\xba", b"\xbb"), skills, [], "as it is now"),
        (lambda: shutil.copy(FIRST, "out/toy/skills.pt"), eval_libero, PROMPT, "has not learned"),
        (lambda: torch.save(torch.load(FIRST), FIRST), eval_libero, PROMPT, "another lam.pt"),
        (lambda: Path(RECORDS).write_text("7\n"), eval_libero, [], f"{RECORDS} is damaged"),
        (lambda: np.save(LATENTS, np.load(LATENTS) + 1), skills, [], "was trained with"),
        (lambda: replace_bytes(TEXTS, b"black", b"green"), policy, [], "trained with data"),
        (lambda: replace_bytes(ACTIONS, b"\x80", b"\x81"), policy, [], "trained with data"),
        (lambda: replace_bytes(TEXTS, b'"val"', b'"train"'), skills, [], "as it is now"),
        (lambda: np.save("out/toy/skills1.robot.npy", np.eye(3)), policy, [], "`python skills.py`"),
        (lambda: os.truncate(write_libero(), 9000), data, ["libero"], "stove_demo.hdf5"),
        (lambda: write_libero(**{"obs/agentview_rgb": None}), data, ["libero"], "agentview_rgb"),
        (lambda: write_libero(**{"obs/joint_states": None}), data, ["libero"], "joint_states"),
        (lambda: write_libero(actions=np.zeros((3, 7))), data, ["libero"], "actions"),
        (lambda: write_libero(actions=np.full((5, 7), np.nan)), data, ["libero"], "NaN"),
        (lambda: write_libero().rename("raw/7.mp4"), data, ["video"], "7.mp4"),
        (write_libero, data, ["libero", "--out", "out"], "exists already"),
    ],
)
def test_bad_input_is_refused(folder, monkeypatch, capsys, damage, script, words, message):
    monkeypatch.setitem(sys.modules, "libero", None)  # LIBERO is not installed
    monkeypatch.setattr(torch.distributed, "init_process_group", print)
    monkeypatch.setenv("WORLD_SIZE", "1")  # so that it is put back
    if damage:
        damage()
    before = contents(folder)

    with pytest.raises(SystemExit) as stop:
        run(script, *words)

    error = capsys.readouterr().err
    assert stop.value.code == 2 and contents(folder) == before
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


# -------------------------------------------------------------------------------------- benchmark
def benchmark():
    """Print the median milliseconds of chunk and dechunk, forward and backward, ours and theirs."""
    from h_net_dynamic_chunking import DynamicSequenceChunker

    package, stage = DynamicSequenceChunker(256), skills.Stage(256, 1, 1)
    package.to_queries_keys.weight.data.copy_(torch.eye(256).repeat(2, 1))  # as our q and k

    def ours(x):
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        p, boundary = skills.route(stage.q(x), stage.k(x), mask)
        z, _, position = skills.chunk(x, boundary)
        return skills.dechunk(z, p, boundary, position), skills.ratio_loss(boundary, p, mask, 6)[0]

    def theirs(x):
        z, upsample, loss = package(x)
        return upsample(z), loss

    for length in (64, 256):
        turn = 1 - 2 * (torch.arange(length) // 6 % 2)[:, None]  # every 6 positions x turns round
        x = turn * noise(16, 1, 256) + 0.3 * noise(16, length, 256, seed=1)
        taken = {ours: [], theirs: []}
        for function in [ours, theirs] * 40:
            begin = time.perf_counter()
            out, loss = function(x.requires_grad_())
            (out.mean() + loss).backward()
            taken[function].append(1000 * (time.perf_counter() - begin))
        a, b = (np.median(times[5:]) for times in taken.values())
        print(f"B 16, T {length}, D 256: ours {a:.1f} ms, theirs {b:.1f} ms, ratio {a / b:.2f}")


# ------------------------------------------------------------------------- killed at random moments
def kill_and_compare(times):
    """Kill each script so often at a random moment, start it again, and print how often all files
    then hold, bit for bit, what those of an undisturbed run do."""
    rng = np.random.default_rng(0)
    commands = {"packing": ["-c", "import data; data.pack_toy('data/toy', 40, 4)"]}
    for script in (lam, skills, policy):
        commands[script.__name__] = [script.__file__, *TINY[script], "--log-every", 1]
    commands["eval_libero"] = [eval_libero.__file__, *TINY[eval_libero], "--variant", "hilam"]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where packing finds data.py
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder, "undisturbed")  # grows by what each command makes
        whole.mkdir()
        for name, command in commands.items():
            before = shutil.copytree(whole, Path(folder, f"before_{name}"))
            begin = time.time()
            python(command, whole)
            longest, equal = time.time() - begin, 0
            for i in range(times):
                tried = shutil.copytree(before, Path(folder, f"{name}_{i}"))
                with suppress(subprocess.TimeoutExpired):
                    python(command, tried, longest * rng.random())
                with suppress(AssertionError):
                    python(command, tried)
                    assert_same(tried, whole)
                    equal += 1
                shutil.rmtree(tried)
            print(f"{name}: {equal} of {times} as undisturbed; a run takes {longest:.0f} s")


if __name__ == "__main__":
    if "--kill" in sys.argv:
        kill_and_compare(int(sys.argv[-1]))
    else:
        benchmark()
