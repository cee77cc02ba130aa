"""
Tests of everything on tiny data, a minute and a half: python -m pytest -q test_all.py
Speed of chunking (pip install h-net-dynamic-chunking==0.5.19): python test_all.py
"""

import importlib.util
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

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
TINY = {  # words that make a script's run short
    lam: [*TRAIN, "--width", 8],
    skills: [*TRAIN, "--width", 16, "--layers", 1],
    policy: [*TRAIN, "--width", 16, "--layers", 1, "--channels", 8, "--pretrain-steps", 4],
    eval_libero: ["--demos", 1, "--tasks", 0, 3, "--episodes", 1, "--max-steps", 6],
}
TINY |= {data: [], policy: [*TINY[policy], "--demos", 1]}
STAGES = {
    "lam": lam,
    "skills": skills,
    "policy_pretrain_skills1_latents": policy,
    "policy_hilam_1": policy,
}
LAM = {"wrist": False, "gap": 4, "latent": 4, "width": 8, "odd": False}
POLICY = {"width": 16, "channels": 8, "patch": 4, "layers": 1, "chunk": 4, "text": None}
HNETS = pytest.mark.parametrize("stages, gap", [(2, 1), (3, 4)])


# ---------------------------------------------------------------------------------------- helpers
def call(script, *words):
    """Run main() of a script in this process, with these words on its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        script.main()


def tiny(script, folder):
    """Words for a short run of a script on folder/toy that writes to folder/out."""
    toy = (folder / "toy").resolve()
    sets = ["--data", toy / "hand", toy / "robot"] if script in STAGES.values() else []
    return [*TINY[script], "--out", folder / "out", *sets]


def error_of(folder, script, *words):
    """The one line of stderr with which main() leaves, at status 2; no file of folder changes."""
    before = contents(folder)
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        call(script, *words)
    text = stderr.getvalue()
    assert stop.value.code == 2 and contents(folder) == before
    assert text.startswith("error: ") and text.endswith("\n") and text.count("\n") == 1
    return text


def contents(folder):
    """{name: bytes} of all files under a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def checkpoint(folder, name):
    """A checkpoint of the run folder folder/out, a dict."""
    return torch.load(folder / f"out/{name}.pt", weights_only=True)


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


def agent(skill, low_text=False, cameras=1, proprio=3, target=3):
    """A random policy for frames of 32 x 32; skill: its width, 0 for a flat one."""
    shape = {"size": 32, "cameras": cameras, "high_cameras": cameras, "proprio": proprio}
    shape |= {"skill": skill, "target": target}
    return randomised(policy.Agent(shape, POLICY | {"low_text": low_text}))


@pytest.fixture
def dataset(tmp_path):
    """A packed set of 6 + 9 frames to train on and 4 held out; all numbers of row t are t."""
    episodes = []
    for text, first, length in (("a", 0, 6), ("b", 6, 9), ("c", 15, 4)):
        t = np.arange(first, first + length, dtype=np.float32)[:, None]
        frames = np.tile(t[..., None, None].astype(np.uint8), (1, 16, 16, 3))
        arrays = {"frames": frames, "actions": np.tile(t, 2), "proprio": np.tile(t, 3)}
        episodes.append((text, text, "val" if text == "c" else "train", arrays))
    data.pack(tmp_path / "set", episodes)
    return data.Packed(tmp_path / "set")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny toy world, toy, its run folder, out, and a set with cut frames, cut."""
    folder = tmp_path_factory.mktemp("trained")
    data.pack_toy(folder / "toy", hand=12, demos=2)
    shutil.copytree(folder / "toy/robot", folder / "cut")
    os.truncate(folder / "cut/frames.bin", 9999)
    for script in (lam, skills, policy):
        call(script, *tiny(script, folder))
    call(policy, *tiny(policy, folder), "--variant", "flat")
    call(eval_libero, *tiny(eval_libero, folder))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """The same with a copy of the run folder, to work in."""
    (tmp_path / "toy").symlink_to(trained / "toy")
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


# -------------------------------------------------------------------------- H-Net and its skills
def test_ste_is_one_forward_and_the_identity_backward():
    c = torch.tensor([0.2, 0.9], requires_grad=True)

    skills.ste(c).backward(torch.tensor([3.0, -5.0]))

    assert skills.ste(c).tolist() == [1, 1] and c.grad.tolist() == [3, -5]


@pytest.mark.parametrize("least, apart", [(1, 1), (4, 1), (1, 3)])
def test_route_equals_the_loop(least, apart):
    q, k, mask = noise(2, 20, 3), noise(2, 20, 3, seed=1), masked([20, 9], 20)

    p, boundary = skills.route(q, k, mask, least, apart)

    for b, t in np.ndindex(2, 20):
        cosine = torch.cosine_similarity(q[b, max(0, t - apart)], k[b, t], dim=0)
        expected = (1 - cosine.item()) / 2 if t else 1.0
        recent = boundary[b, max(0, t - max(least, apart) + 1) : t].any()
        assert p[b, t].item() == pytest.approx(expected, abs=1e-5)
        assert boundary[b, t] == (expected >= 0.5 and mask[b, t] and not recent)


@pytest.mark.parametrize("apart", [1, 3])
def test_gradient_of_route_is_right(apart):
    inputs = [noise(2, 9, 3, seed=seed).double().requires_grad_() for seed in (0, 1)]
    mask = masked([9, 5], 9)

    assert torch.autograd.gradcheck(lambda q, k: skills.route(q, k, mask, 1, apart)[0], inputs)


def chunk_loop(h, p, boundary):
    """H-Net's equations, one position at a time: at a boundary y = (1 - p) y + p h."""
    y, out = torch.zeros_like(h[:, 0]), []
    for t in range(p.shape[1]):
        weight = (p[:, t].clamp(1e-4, 1 - 1e-4) * boundary[:, t])[:, None]
        y = (1 - weight) * y + weight * h[:, t]
        out.append(y)
    confidence = torch.where(boundary, p, 1 - p)[..., None]
    return torch.stack(out, dim=1) * (1 + confidence - confidence.detach())


def test_chunk_and_dechunk_and_their_gradients_equal_the_loop():
    inputs = noise(3, 40, 5).requires_grad_(), noise(3, 40).sigmoid().requires_grad_()
    h, p = inputs
    boundary = ((p >= 0.5) | (torch.arange(40) == 0)) & masked([40, 40, 15], 40)

    z, mask, position = skills.chunk(h, boundary)
    ours = skills.dechunk(z, p, boundary, position)

    assert mask.sum(1).tolist() == boundary.sum(1).tolist() and torch.equal(z[mask], h[boundary])
    loop = chunk_loop(h, p, boundary)
    torch.testing.assert_close(ours, loop, rtol=1e-4, atol=1e-5)
    found, true = (torch.autograd.grad(out.tanh().sum(), inputs) for out in (ours, loop))
    torch.testing.assert_close(found, true, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("count, g, n, loss", [(1, 0.25, 4, 1), (2, 0.5, 4, 4 / 3), (0, 0, 3, 1.5)])
def test_ratio_loss_counts_no_padding(count, g, n, loss):
    mask = masked([4], 6)
    boundary = masked([count], 6) | ~mask  # at padding everything speaks for a boundary
    p = torch.where(mask, g, 0.9)

    found = skills.ratio_loss(boundary, p, mask, n)

    assert [x.item() for x in found] == pytest.approx([loss, count / 4, g], rel=1e-5)


@HNETS
@pytest.mark.parametrize("t", [1, 6, 8])
def test_hnet_is_causal(stages, gap, t):
    model, mask = randomised(skills.HNet(5, 16, stages, 1, 3, gap)), masked([24, 15, 9], 24)
    z, changed = noise(3, 24, 5), noise(3, 24, 5)
    changed[:, t] = noise(3, 5, seed=1)

    before, routings = model(z, mask)
    after, others = model(changed, mask)

    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-4, atol=1e-4)
    assert (before - after)[:, t:].abs().amax((1, 2)).min() > 1e-2
    marks, other_marks = skills.frame_rate(routings)[0], skills.frame_rate(others)[0]
    assert all(torch.equal(a[:, :t], b[:, :t]) for a, b in zip(marks, other_marks, strict=True))
    assert 1 < marks[-1][0].sum() < 24


@HNETS
@pytest.mark.parametrize("rows, length", [([0, 1, 2], 24), ([0, 1, 2], 33), ([2], 9)])
def test_hnet_is_blind_to_padding(stages, gap, rows, length):
    model = randomised(skills.HNet(5, 16, stages, 1, 3, gap))
    z, mask = noise(3, 24, 5), masked([24, 15, 9], 24)
    other, other_mask = noise(3, 33, 5, seed=1), masked([24, 15, 9], length)[rows]
    other[:, :24][mask] = z[mask]

    before, routings = model(z, mask)
    after, others = model(other[rows, :length], other_mask)

    torch.testing.assert_close(before[rows][mask[rows]], after[other_mask], rtol=1e-4, atol=1e-4)
    marks, other_marks = skills.frame_rate(routings)[0], skills.frame_rate(others)[0]
    for a, b in zip(marks, other_marks, strict=True):
        assert torch.equal(a[rows][mask[rows]], b[other_mask]) and not b[~other_mask].any()


def add_mean(now, z):  # in place of an FDM
    return now + z.mean(1)[:, None, None, None]


def test_reconstruction_compares_the_frame_drawn_with_the_predicted_latent(dataset):
    model = lam.LAM(LAM, 16)
    rows = np.arange(6, 12)[None]
    z, mask, scale = noise(1, 6, 4).requires_grad_(), masked([3], 6), [(torch.zeros(4) + 0.5, 2.0)]
    model.fdm.forward = add_mean
    rng, source = np.random.default_rng(0), np.zeros(1, int)

    loss = skills.reconstruction(model, z, mask, rows, source, [dataset], scale, rng)

    now, true = (model.frames(dataset, rows[0, 1:3] + gap, "cpu") for gap in (0, 4))
    drawn = now + (2 * z[0, :2] + 0.5).mean(1)[:, None, None, None]
    expected = (drawn - true).square().sum() / (now - true).square().sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    assert z.grad[0, :2].abs().min() > 0 and z.grad[0, 2:].abs().max() == 0


@HNETS
def test_skills_at_frame_rate_equal_the_loop(stages, gap):
    model = randomised(skills.HNet(5, 16, stages, 1, 3, gap))
    starts, lengths, z = [0, 30], [30, 17], noise(47, 5)
    dataset = SimpleNamespace(name="set", start=np.array(starts), length=np.array(lengths))

    boundaries, vectors, _ = skills.segment(model, dataset, z.numpy(), gap, "cpu")

    for start, length in zip(starts, lengths, strict=True):
        known = length - gap
        _, routings = model(z[None, start : start + known], masked([known], known))
        frames = list(range(known))  # at which the stage has a position
        for stage, routing in enumerate(routings):
            for t in range(length):
                expected = routing.vectors[0, sum(frame <= t for frame in frames) - 1]
                assert np.allclose(vectors[stage][start + t], expected, atol=1e-4)
            frames = [frames[j] for j in routing.boundary[0].nonzero()[:, 0].tolist()]
            found = np.flatnonzero(boundaries[start : start + length, stage])
            assert found.tolist() == frames


@pytest.mark.parametrize("rule", ["first", "ahead", "plan"])
def test_skill_is_the_first_vector_or_what_is_ahead_in_this_segment_and_the_next(rule):
    vectors = noise(10, 4).numpy()
    boundary = np.array([1, 0, 0, 1, 1, 0, 0, 0, 1, 0], bool)  # episodes: 0 to 3, 4 to 9
    last = np.repeat([3, 9], [4, 6])

    found = skills.skill_vectors(vectors, boundary, rule, last)

    following = {0: vectors[3], 3: vectors[3], 4: vectors[8:].mean(0), 8: vectors[9]}
    for begin, end in ((0, 3), (3, 4), (4, 8), (8, 10)):
        for t in range(begin, end):
            ahead = vectors[t:end].mean(0)
            both = np.concatenate([ahead, following[begin]])
            expected = {"first": vectors[begin], "ahead": ahead, "plan": both}[rule]
            assert np.allclose(found[t], expected, atol=1e-6)


def test_uniform_boundaries_are_as_many_in_each_episode_and_evenly_spread():
    boundary = np.isin(np.arange(29), [0, 1, 2, 3, 20, 28])

    uniform = np.flatnonzero(skills.uniform_boundaries(boundary, [0, 20], [20, 9]))

    assert uniform.tolist() == [0, 5, 10, 15, 20, 24]


def test_events_are_the_middles_of_grasps_and_releases_and_other_changes():
    phase = np.repeat([0, 1, 2, 0, 3, 0], [4, 3, 5, 6, 5, 2])

    found = skills.events(phase, ["reach", "grasp", "carry", "release"])

    assert found.tolist() == [5, 12, 20]  # middle of grasp; carry to reach; middle of release


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
    torch.manual_seed(0)
    frames = torch.rand(3, 6, 32, 32)

    now, future = lam.warp(frames, frames, amount)

    assert torch.equal(now, future)
    assert least <= (now - frames).abs().mean() <= most


@pytest.mark.parametrize("reverse, steps", [(False, [4] * 8), (True, [4, -4] * 4)])
def test_get_batch_pairs_frames_k_apart_and_every_other_backwards(dataset, reverse, steps):
    rows, rng, model = dataset.rows([0, 1], 4), np.random.default_rng(0), lam.LAM(LAM, 16)

    pair = lam.get_batch(model, [dataset], [rows], 8, reverse, rng, "cpu")

    now, future = ((255 * frames[:, 0, 0, 0]).round() for frames in pair)  # a pixel is its row
    assert (future - now).tolist() == steps
    assert set(torch.minimum(now, future).tolist()) <= set(rows)


def test_encode_writes_latents_where_there_is_a_frame_t_plus_k_and_zeros_elsewhere(dataset):
    model = lam.LAM(LAM, 16)

    latents = lam.encode(model, dataset, "cpu")

    assert np.flatnonzero(latents.any(1)).tolist() == [0, 1, 6, 7, 8, 9, 10]
    frames = model.frames(dataset, np.array([7, 11]), "cpu")
    assert np.allclose(latents[7], model.idm(frames[:1], frames[1:])[0].detach(), atol=1e-5)


def test_probe_reads_true_motion_from_motion(trained):
    sets = [data.Packed(trained / name) for name in ("toy/hand", "toy/robot")]

    figures = lam.probe(sets, [np.array(dataset.open("truth_motion")) for dataset in sets], 1)

    assert min(figures["action_r2"][:2]) > 0.9 and figures["gripper_f1"] > 0.9


def test_probe_reads_nothing_from_a_random_latent(trained):
    sets = [data.Packed(trained / name) for name in ("toy/hand", "toy/robot")]

    figures = lam.probe(sets, [noise(dataset.total, 8).numpy() for dataset in sets], 1)

    assert max(*figures["action_r2"], figures["gripper_f1"]) < 0.3


# ----------------------------------------------------------------------------------------- policy
def test_targets_of_a_chunk_are_the_next_rows_that_have_one_in_the_episode(dataset):
    labels = policy.Labels(dataset, [0, 1], np.array(dataset.actions), gap=1)

    batch = labels.batch(np.array([0, 3, 4, 13]), 4)

    rows = [target[:, 0][mask] for target, mask in zip(batch["target"], batch["mask"], strict=True)]
    assert [row.tolist() for row in rows] == [[0, 1, 2, 3], [3, 4], [4], [13]]


def test_what_lies_past_the_episodes_end_is_not_learned():
    flat, mask, images = agent(0), masked([4, 2], POLICY["chunk"]), noise(2, 1, 3, 32, 32)
    tokens = torch.stack([policy.tokenize("put it down")] * 2)
    prediction = flat.predict(images, tokens, None).detach()
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


def test_fine_tuning_leaves_the_high_level_exactly_as_it_was_and_changes_the_low_level(trained):
    before, after = (checkpoint(trained, name)["model"] for name in list(STAGES)[2:])

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
    dataset = SimpleNamespace(episodes=episodes, split=lambda name: train)

    assert policy.labelled_episodes(dataset, demos, tasks).tolist() == chosen


@pytest.mark.parametrize("variant", ["hilam", "flat"])
def test_acting_alone_equals_acting_in_a_batch(trained, variant):
    robot = data.Packed(trained / "toy/robot")
    acting = policy.load_agent(trained / "out", variant, 1, "cpu")
    rows, texts = robot.start[:4] + 3, [episode["text"] for episode in robot.episodes[:4]]

    together = acting.act(robot.frames[rows], None, robot.proprio[rows], texts)

    alone = acting.act(robot.frames[rows[3:]], None, robot.proprio[rows[3:]], texts[3:])
    np.testing.assert_allclose(alone[0], together[3], atol=1e-5)


def test_sentences_are_read_by_a_t5(folder):
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    words = {"<unk>": 0, "put": 1, "the": 2, "block": 3, "down": 4}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    config = transformers.T5Config(vocab_size=9, d_model=24, d_ff=16, num_layers=1, num_heads=2)
    encoder, t5 = transformers.T5EncoderModel(config).eval(), str(folder / "t5")
    for part in (fast, encoder):
        part.save_pretrained(t5)

    call(policy, *tiny(policy, folder), "--variant", "flat_z0", "--text", t5, "--layers", 0)

    states = encoder(torch.tensor([[1, 2, 3, 4]])).last_hidden_state[0]
    torch.testing.assert_close(policy.tokenize("put the block down", t5), states.mean(0).detach())
    assert policy.load_agent(folder / "out", "flat_z0", 1, "cpu").low.text[0].in_features == 24


# ------------------------------------------------------------------------------------------- data
def test_packed_set_holds_what_was_packed_and_knows_rows_with_another_gap_later(dataset):
    assert np.array_equal(dataset.frames[:, 5, 7, 1], np.arange(19))
    assert np.array_equal(dataset.actions, np.tile(np.arange(19)[:, None], 2))
    assert dataset.start.tolist() == [0, 6, 15] and dataset.length.tolist() == [6, 9, 4]
    assert [episode["text"] for episode in dataset.episodes] == ["a", "b", "c"]
    assert dataset.split("train").tolist() == [0, 1] and dataset.split("val").tolist() == [2]
    for gap in (0, 1, 5, 7):
        assert dataset.rows([0, 1], gap).tolist() == [*range(0, 6 - gap), *range(6, 15 - gap)]


def test_failing_writer_leaves_the_old_file(tmp_path):
    data.write(tmp_path / "a.json", [1])

    with pytest.raises(TypeError):
        data.write(tmp_path / "a.json", [2, json])  # a module is no JSON

    assert json.loads((tmp_path / "a.json").read_text()) == [1]


def test_toy_world_depends_on_the_seed_alone(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        data.pack_toy(tmp_path / name, 4, 1, seed=seed)

    a, b, c = (contents(tmp_path / name) for name in "abc")
    assert a == b
    assert not any(a[key] == c[key] for key in ("hand/frames.bin", "robot/actions.bin"))


@pytest.mark.parametrize("goal", data.TASKS)
def test_toy_demonstration_replayed_puts_the_blocks_where_the_text_says(goal):
    arrays = data.toy_demonstrate("robot", goal, [5, 0], 32)
    world, words = data.ToyWorld([goal], [[5, 0]]), data.toy_text(goal).split()

    for frame, action in zip(arrays["frames"], arrays["actions"], strict=True):
        assert np.array_equal(world.frames([0])[0], frame)
        success = world.step(action[None])[0]

    assert success and len(arrays["actions"]) < data.TOY_LIMIT
    place = dict(zip([*data.BLOCKS, *data.TRAYS], world.objects[0], strict=True))
    for block, tray in ((words[2], words[6]), (words[10], words[14])):
        assert np.abs(place[block] - place[tray]).max() < data.TRAY_HALF


def test_two_runs_that_pack_the_toy_world_at_once_leave_one_whole_set(tmp_path, monkeypatch):
    demonstrate = data.toy_demonstrate

    def meanwhile(*words):
        """Another process packs everything while this one is at its first episode."""
        monkeypatch.setattr(data, "toy_demonstrate", demonstrate)
        other = get_context("fork").Process(target=data.pack_toy, args=(tmp_path / "toy", 4, 1))
        other.start()
        other.join()
        assert other.exitcode == 0
        return demonstrate(*words)

    data.pack_toy(tmp_path / "alone", 4, 1)
    monkeypatch.setattr(data, "toy_demonstrate", meanwhile)

    data.pack_toy(tmp_path / "toy", 4, 1)

    assert contents(tmp_path / "toy") == contents(tmp_path / "alone")


def write_libero(folder, **change):
    """A file of 12 demonstrations of 5 frames in LIBERO's schema; row j of demonstration i can be
    told in every array. change: other arrays, None to leave one out. Returns its path."""
    h5py, path = pytest.importorskip("h5py"), folder / "put_the_bowl_on_the_stove_demo.hdf5"
    folder.mkdir()
    j = np.arange(5.0)[:, None]
    with h5py.File(path, "w") as file:
        attributes = file.create_group("data").attrs
        attributes["problem_info"] = '{"language_instruction": "put the bowl on the stove"}'
        for i in range(12):
            image = np.tile((10 * i + j)[:, :, None, None], (1, 16, 16, 3)).astype(np.uint8)
            arrays = {"obs/agentview_rgb": image, "obs/eye_in_hand_rgb": 255 - image}
            arrays |= {"actions": np.tile(i + j / 100, 7), "obs/gripper_states": np.tile(-j, 2)}
            arrays |= {"obs/joint_states": np.tile(i + j / 10, 7)} | change
            for name, array in arrays.items():
                if array is not None:
                    file.create_dataset(f"data/demo_{i}/{name}", data=array)
    return path


def imported(kind, tmp_path, *words):
    """tmp_path/raw imported as tmp_path/set with frames of 16 x 16."""
    call(data, kind, "--src", tmp_path / "raw", "--out", tmp_path / "set", "--size", 16, *words)
    return data.Packed(tmp_path / "set")


@pytest.mark.parametrize("words", [[], ["--no-actions"]])
def test_libero_import_pairs_a_frame_with_the_action_after_it(tmp_path, words):
    write_libero(tmp_path / "raw")

    packed = imported("libero", tmp_path, *words)

    assert (packed.actions is None) == (packed.proprio is None) == bool(words)
    assert packed.length.tolist() == [4] * 12
    assert {episode["text"] for episode in packed.episodes} == {"put the bowl on the stove"}
    for i, j in np.ndindex(12, 4):  # in natural order: demo_10 is the eleventh
        t = 4 * i + j
        assert {*packed.frames[t].flat} == {10 * i + j}
        assert {*packed.wrist[t].flat} == {255 - 10 * i - j}
        assert np.allclose(packed.true_actions()[t], i + (j + 1) / 100)
        assert words or np.allclose(packed.proprio[t], [i + j / 10] * 7 + [-j] * 2)


GREYS = [20 * i for i in range(12)]  # of the frames of a clip


def write_clip(path, width=32, height=32, fps=10):
    """A video of 12 frames, grey but for a white left edge, an eighth of the picture."""
    av = pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", fps, width=width, height=height, pix_fmt="yuv420p")
        for grey in GREYS:
            image = Image.new("RGB", (width, height), (grey,) * 3)
            image.paste((255, 255, 255), (0, 0, width // 8, height))
            video.mux(stream.encode(av.VideoFrame.from_image(image)))
        video.mux(stream.encode())


def write_images(folder, ending):
    """A folder of 12 grey images, whose names do not sort like their numbers."""
    folder.mkdir(parents=True)
    for i, grey in enumerate(GREYS):
        Image.new("L", (32 + i, 32), grey).save(folder / f"frame{i}{ending}")


def turn(path):
    """Mark an .mp4 as filmed with the camera upright: to be turned clockwise by 90 degrees."""
    film = bytearray(path.read_bytes())
    at = film.find(b"tkhd") + 44
    film[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(film)


CAPTIONS = {
    "a.json": '[{"id": "b/2", "label": "push; a cup"}, {"id": 1, "label": "hold a pen"}]',
    "b.json": '{"2": "push; a cup", "1": "hold a pen"}',
    "c.csv": 'id;label\nb/2.MKV;"push; a cup"\n1;hold a pen\n',
    "d.csv": "file,text\n2.MKV,push; a cup\n1,hold a pen\n",
}


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions_are_found_by_a_clips_name(tmp_path, name):
    write_images(tmp_path / "raw/1", ".png")
    write_clip(tmp_path / "raw/b/2.MKV")
    (tmp_path / name).write_text(CAPTIONS[name], encoding="utf-8-sig")  # with a byte order mark

    packed = imported("video", tmp_path, "--labels", tmp_path / name)

    captions = {episode["task"]: episode["text"] for episode in packed.episodes}
    assert captions == {"1": "hold a pen", "b/2": "push; a cup"}


def test_clips_are_read_from_any_depth_and_in_the_order_of_their_frames(tmp_path):
    write_images(tmp_path / "raw/a", ".bmp")
    write_images(tmp_path / "raw/b/c/d", ".png")
    for name in ("b/2.mp4", "b/10.mov", "b/c/film.avi", "e.mpg"):
        write_clip(tmp_path / "raw" / name)

    packed = imported("video", tmp_path, "--workers", 2)

    assert [e["task"] for e in packed.episodes] == ["a", "b/2", "b/10", "b/c/d", "b/c/film", "e"]
    assert packed.frames[:, 8, 8, 0].astype(int) == pytest.approx(np.tile(GREYS, 6), abs=6)


@pytest.mark.parametrize("fit, edge", [("crop", 0), ("squash", 2)])
def test_middle_of_a_wide_clip_is_kept_or_all_of_it_is_squeezed(tmp_path, fit, edge):
    write_clip(tmp_path / "raw/wide.mp4", width=64)

    packed = imported("video", tmp_path, "--fit", fit)

    assert (packed.frames[0, 8, :, 0] > 128).sum() == edge  # the white columns of 16


def test_clip_filmed_upright_is_turned_upright(tmp_path):
    write_clip(tmp_path / "raw/phone.mp4")
    turn(tmp_path / "raw/phone.mp4")

    packed = imported("video", tmp_path)

    rows, columns = np.nonzero(packed.frames[0, :, :, 0] > 128)  # the left edge is now on top
    assert set(rows) == {0, 1} and set(columns) == set(range(16))


@pytest.mark.parametrize("fps, kept", [(5, GREYS[::2]), (20, np.repeat(GREYS, 2)[1:])])
def test_clip_is_resampled_by_its_time_stamps(tmp_path, fps, kept):
    write_clip(tmp_path / "raw/clip.mp4", fps=10)

    packed = imported("video", tmp_path, "--fps", fps)

    assert packed.frames[:, 8, 8, 0].astype(int) == pytest.approx(kept, abs=6)


def test_clips_of_different_rates_are_named_unless_resampled(tmp_path, capsys):
    for fps in (10, 60):
        write_clip(tmp_path / f"raw/{fps}.mp4", fps=fps)

    imported("video", tmp_path)

    assert "[10, 60] frames a second are mixed" in capsys.readouterr().out


def test_clips_that_cannot_be_read_are_skipped_and_named(tmp_path, capsys):
    for name in ("good.mp4", "half.mkv", "bad.mp4"):
        write_clip(tmp_path / "raw" / name, fps=2)
    os.truncate(tmp_path / "raw/bad.mp4", 900)
    os.truncate(tmp_path / "raw/half.mkv", 2 * (tmp_path / "raw/half.mkv").stat().st_size // 3)
    (tmp_path / "raw/still").mkdir()
    Image.new("L", (32, 32)).save(tmp_path / "raw/still/one.png")

    packed = imported("video", tmp_path)

    assert [episode["task"] for episode in packed.episodes] == ["good", "half"]
    assert packed.length[0] == 12 and 1 < packed.length[1] < 12
    skipped = (tmp_path / "set/skipped.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in skipped] == ["bad", "half", "still"]
    assert "3 unreadable in part" in capsys.readouterr().out


# ------------------------------------------------------------------------- training and resuming
@pytest.mark.parametrize("deaths", [[], [2, 4]], ids=["again", "interrupted"])
@pytest.mark.parametrize("name", STAGES)
def test_training_again_gives_the_same_numbers(trained, folder, monkeypatch, name, deaths):
    def write_and_die(path, content):
        data.write(path, content)
        if path.name == f"{name}.pt":
            raise KeyboardInterrupt

    words = tiny(STAGES[name], folder)
    (folder / f"out/{name}.pt").unlink()
    for step in deaths:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(STAGES[name], "write", write_and_die)
            call(STAGES[name], *words)
        assert checkpoint(folder, name)["step"] == step

    call(STAGES[name], *words)

    ours, whole = checkpoint(folder, name), checkpoint(trained, name)
    for key in ("model", "optimizer", "log"):
        torch.testing.assert_close(ours[key], whole[key], rtol=0, atol=0)


@pytest.mark.parametrize("script", [lam, policy])
def test_two_processes_train_like_one_with_twice_the_batch(trained, folder, script):
    names = [name for name in STAGES if STAGES[name] is script]
    for name in names:
        (folder / f"out/{name}.pt").unlink()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script.__file__]
    words = [*launch, *tiny(script, folder), "--batch", 4]

    subprocess.run([sys.executable, *map(str, words)], check=True)

    for name in names:
        one, two = (checkpoint(run, name)["optimizer"]["state"] for run in (trained, folder))
        for key in one:  # Adam's mean of the gradients
            a, b = one[key]["exp_avg"], two[key]["exp_avg"]
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", STAGES)
def test_log_is_written_as_a_table_and_drawn(trained, name):
    log = checkpoint(trained, name)["log"]

    header, *lines = (trained / f"out/{name}_log.csv").read_text().splitlines()
    picture = Image.open(trained / f"out/{name}_log.png").convert("L")

    assert [row["step"] for row in log] == [2, 4] and header == ",".join(log[0])
    for line, row in zip(lines, log, strict=True):
        assert list(map(float, line.split(","))) == pytest.approx(list(row.values()), rel=1e-4)
    assert np.ptp(picture) > 50


def test_skills_refuse_several_processes(folder, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)

    assert "one process" in error_of(folder / "out", skills, *tiny(skills, folder))


# ------------------------------------------------------------------------------------- evaluation
@pytest.mark.parametrize("execute", [1, 3, 4])
def test_ensemble_equals_the_loop(execute):
    ensemble, chunks = eval_libero.Ensemble(), noise(7, 2, 4, 3).numpy()  # 7 decisions, 2 jobs
    for d, jobs in enumerate([[0, 1]] * 4 + [[1]] * 3):  # the first episode ends earlier
        found = ensemble(jobs, chunks[d, jobs], execute)

        for i, n in np.ndindex(len(jobs), execute):
            places = [(d - e) * execute + n for e in range(d + 1)]  # of this step in each chunk
            seen = [(e, place) for e, place in enumerate(places) if place < 4]
            predicted = [chunks[e, jobs[i], place] for e, place in seen]
            weights = [np.exp(-0.01 * e * execute) for e, _ in seen]  # older ones weigh more
            assert np.allclose(found[i, n], np.average(predicted, 0, weights), atol=1e-5)


def test_keep_grip_holds_the_last_clear_command():
    commands = np.array([[0.4], [0.6], [-0.4], [-0.6], [0.2]])

    kept = eval_libero.keep_grip(commands, -1, 0.5)[:, 0]

    assert kept.tolist() == [-1, 0.6, 0.6, -0.6, -0.6]


def test_rate_has_wilsons_interval():
    found = eval_libero.rate(7, 10)

    assert found == {"success_rate": 0.7, "ci95": [0.3968, 0.8922], "wins": 7, "episodes": 10}


def test_interrupted_evaluation_goes_on_and_repeats_nothing(folder):
    log = folder / "out/eval_toy_flat_1.jsonl"
    first, second = log.read_text().splitlines(keepends=True)
    changed = first.replace('"success": false', '"success": true')  # so that a repeat would show
    log.write_text(changed + second[:30])  # the kill cut the line

    call(eval_libero, *tiny(eval_libero, folder))

    assert log.read_text() == changed + second
    assert json.loads(log.with_suffix(".json").read_text())["success_rate"] == 0.5


def test_success_counts_and_ends_the_episode_at_once(folder, monkeypatch):
    log = folder / "out/eval_toy_flat_1.jsonl"
    log.unlink()
    monkeypatch.setattr(data.ToyWorld, "success", lambda w: (w.goals == data.TASKS[3]).all(1))

    call(eval_libero, *tiny(eval_libero, folder), "--execute", 2)

    records = [json.loads(line) for line in log.read_text().splitlines()]
    found = [(record["task"], record["success"], record["steps"]) for record in records]
    assert sorted(found) == [(0, False, 6), (3, True, 1)]


def test_skills_read_in_a_video_are_those_of_the_same_video_in_the_packed_set(folder, monkeypatch):
    (folder / "data").symlink_to(folder)
    monkeypatch.chdir(folder)
    sets = [data.Packed(path) for path in data.TOY_SETS]
    jobs = [3, 8]  # videos of the hand
    goals = [data.GOALS[int(sets[0].episodes[i]["task"])] for i in jobs]
    world = SimpleNamespace(size=32)
    pool = SimpleNamespace(goals=goals, seeds=[[0, i] for i in jobs], world=world)
    acting = policy.load_agent("out", "hilam", 1, "cpu")

    prompts = eval_libero.read_prompts(pool, "out", acting, "cpu")

    rows = [dataset.rows(dataset.split("train"), 1) for dataset in sets]
    skill = policy.standardise([np.load(f"out/skills1.{d.name}.npy") for d in sets], rows)[0]
    for i, found in zip(jobs, prompts, strict=True):
        np.testing.assert_allclose(found, skill[sets[0].rows([i])], atol=1e-3)


def test_simulator_that_stops_is_named_by_its_task_and_episode(capsys):
    args = SimpleNamespace(workers=1, suite="nowhere")
    pool = eval_libero.LiberoPool([(3, 7)], args, 32)

    with pytest.raises(SystemExit):
        pool.execute([], [])

    assert "task 3, episode 7: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def libero(tmp_path_factory):
    """LIBERO's own environment of the first task of libero_object, and its initial states."""
    package = pytest.importorskip("libero")
    if not Path(package.__path__[0], "libero/assets/scenes").exists():
        pytest.skip("LIBERO's assets are not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", "")  # so that it is put back
        eval_libero.prepare_libero(tmp_path_factory.mktemp("config"))
        from libero.libero import benchmark, get_libero_path
        from libero.libero.envs import OffScreenRenderEnv

        suite = benchmark.get_benchmark("libero_object")()
        folder = Path(get_libero_path("init_states"), suite.name)
        env = OffScreenRenderEnv(bddl_file_name=suite.get_task_bddl_file_path(0))
        yield env, torch.load(folder / suite.get_task(0).init_states_file, weights_only=False)
        env.close()


def test_libero_observations_are_those_of_the_official_loop(libero, tmp_path, monkeypatch):
    (env, states), flat = libero, agent(0, cameras=2, proprio=9, target=7)
    record = {"stage": "policy_finetune", "settings": POLICY | {"low_text": False}, "step": 1}
    record |= {"steps": 1, "shape": flat.shape, "model": flat.state_dict()}
    torch.save(record, tmp_path / "policy_flat_5.pt")
    words = ["--suite", "libero_object", "--variant", "flat", "--demos", 5, "--out", tmp_path]
    words += ["--tasks", 0, "--episodes", 2, "--max-steps", 6, "--settle", 2, "--workers", 1]
    seen, act = [], policy.Agent.act

    def remember(self, *observed):
        actions = act(self, *observed)
        seen.append((*observed, actions[0]))
        return actions

    monkeypatch.setattr(policy.Agent, "act", remember)
    call(eval_libero, *words, "--execute", 4, "--clear", 0)

    assert len(seen) == 4  # two episodes of six steps, two decisions each
    for episode in (0, 1):
        actions = [[0, 0, 0, 0, 0, 0, -1.0]] * 2
        for frames, wrist, proprio, texts, _, chosen in seen[2 * episode : 2 * episode + 2]:
            env.seed(0)
            env.reset()
            env.set_init_state(states[episode])
            true = [env.step(action)[0] for action in actions][-1]
            for ours, camera in ((frames, "agentview"), (wrist, "robot0_eye_in_hand")):
                expected = data.resize(true[f"{camera}_image"][None], 32).astype(float)
                assert expected.std() > 5 and np.abs(ours - expected).mean() < 0.2
            body = [*true["robot0_joint_pos"], *true["robot0_gripper_qpos"]]
            assert np.allclose(proprio[0], body, atol=1e-5)
            assert texts == [env.language_instruction]
            actions = [*actions, *chosen]


def test_libero_demonstration_is_replayed_from_its_own_state(libero, tmp_path):
    h5py, (env, states) = pytest.importorskip("h5py"), libero
    with h5py.File(tmp_path / "task_demo.hdf5", "w") as file:
        for i in (1, 10, 2):  # the last in number is demo_10
            demo = file.create_group(f"data/demo_{i}")
            demo.attrs["model_file"] = env.env.sim.model.get_xml()
            demo["states"], demo["actions"] = states[i : i + 1], np.full((12, 7), i)

    actions = eval_libero.set_demonstration(env, tmp_path / "task_demo.hdf5", 2)

    assert np.allclose(env.get_sim_state(), states[10]) and (actions == 10).all()


# -------------------------------------------------------------------------------------- bad input
def edit(path, **change):
    """Change entries of a checkpoint."""
    torch.save(torch.load(path) | change, path)


@pytest.mark.parametrize(
    "file, damage, script, message",
    [
        ("skills.pt", lambda p: shutil.copy(p.with_name("lam.pt"), p), skills, "not of skills"),
        ("lam.pt", lambda p: edit(p, model={}), lam, "another shape"),
        ("lam.pt", lambda p: os.truncate(p, 3000), lam, "missing or damaged"),
        ("lam.pt", lambda p: edit(p, step=2), skills, "stopped at step 2 of 4"),
        ("policy_hilam_1.pt", lambda p: edit(p, step=3), eval_libero, "stopped at step 3 of 4"),
        ("latents.hand.npy", Path.unlink, skills, "run `python lam.py`"),
        ("latents.hand.npy", lambda p: np.save(p, np.load(p) + 1), skills, "was trained with"),
        ("skills1.robot.npy", lambda p: np.save(p, np.eye(3)), policy, "run `python skills.py`"),
    ],
)
def test_damaged_run_folder_is_refused_and_left_alone(folder, file, damage, script, message):
    damage(folder / "out" / file)

    assert message in error_of(folder / "out", script, *tiny(script, folder))


@pytest.mark.parametrize(
    "script, words, message",
    [
        (lam, ["--data", "nowhere"], "nowhere is no packed dataset"),
        (lam, ["--data", "cut"], "frames.bin has 9999 bytes"),
        (lam, ["--latent", 1], "--latent"),
        (lam, ["--width", 12], "in steps of 8"),
        (lam, ["--steps", 0], "--steps"),
        (lam, ["--seed", -1], "--seed"),
        (lam, ["--gap", 0], "--gap"),
        (lam, ["--gap", 500], "--gap 500 is longer than all episodes"),
        (lam, ["--lr", "nan"], "--lr"),
        (lam, ["--lr", 1e30, "--out", "new"], "the gradient is"),
        (lam, ["--device", "cuda"], "--device cuda"),
        (data, ["toy", "--val", 0.7], "--val"),
        (data, ["libero", "--src", "toy", "--demos", -3], "--demos"),
        (data, ["video", "--src", "toy", "--size", 0], "--size"),
        (skills, ["--layers", 0], "--layers"),
        (skills, ["--width", 20], "--width"),
        (skills, ["--chunk", 1, 3], "--chunk"),
        (policy, ["--channels", 9], "--channels"),
        (policy, ["--patch", 5], "--patch 5"),
        (policy, ["--demos", 0], "--demos"),
        (policy, ["--demos", 1.5], "--demos"),
        (policy, ["--variant", "flat", "--demos", 99], "--demos 99: task"),
        (policy, ["--video", "puppet"], "choose from hand, robot"),
        (policy, ["--variant", "flat", "--tasks", 10], "there are 10 tasks"),
        (eval_libero, ["--demos", 7], "policy_hilam_7.pt"),
        (eval_libero, ["--variant", "flat", "--prompt", "video"], "this policy is flat"),
        (eval_libero, ["--suite", "libero_kitchen"], "libero_object"),
        (eval_libero, ["--suite", "libero_object"], "pip install"),
    ],
)
def test_bad_argument_is_refused(trained, folder, monkeypatch, script, words, message):
    monkeypatch.chdir(trained)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # LIBERO is not installed

    assert message in error_of(folder / "out", script, *tiny(script, folder), *words)


@pytest.mark.parametrize(
    "kind, make, message",
    [
        ("libero", lambda raw: None, "no such folder"),
        ("libero", lambda raw: os.truncate(write_libero(raw), 9000), "stove_demo.hdf5"),
        ("libero", lambda raw: write_libero(raw, **{"obs/joint_states": None}), "joint_states"),
        ("libero", lambda raw: write_libero(raw, actions=np.zeros((3, 7))), "actions"),
        ("libero", lambda raw: write_libero(raw, actions=np.full((5, 7), np.nan)), "NaN"),
        ("libero", lambda raw: [write_libero(raw), raw.with_name("set").mkdir()], "exists already"),
        ("video", lambda raw: raw.mkdir(), "no .mp4"),
        ("video", lambda raw: write_libero(raw).rename(raw / "7.mp4"), "7.mp4"),
    ],
)
def test_bad_files_are_refused_and_nothing_is_written(tmp_path, kind, make, message):
    make(tmp_path / "raw")
    words = ["--src", tmp_path / "raw", "--out", tmp_path / "set", "--size", 16]

    assert message in error_of(tmp_path, data, kind, *words)


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


if __name__ == "__main__":
    benchmark()
