"""
Tests of everything, on tiny data: python -m pytest -q test_all.py, three minutes on two cores.

The speed of chunking, beside a published package's (pip install h-net-dynamic-chunking==0.5.19):
python test_all.py
"""

import csv
import importlib.util
import io
import json
import os
import shutil
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

TRAIN = ["--steps", 4, "--log-every", 2]
TINY = {
    lam: [*TRAIN, "--width", 8, "--batch", 8],
    skills: [*TRAIN, "--width", 16, "--layers", 1, "--batch", 4],
    policy: [
        *TRAIN,
        "--pretrain-steps",
        4,
        "--batch",
        8,
        "--demos",
        1,
        "--width",
        16,
        "--layers",
        1,
    ],
    eval_libero: ["--demos", 1, "--tasks", 0, 3, "--episodes", 1, "--max-steps", 6],
}
TINY[policy] += ["--channels", 8, "--warp", 0.1]
HILAM = ["policy_pretrain_z1_z0", "policy_hilam_1"]  # what policy.py makes with TINY, without .pt


# ---------------------------------------------------------------------------------------- helpers
class Killed(Exception):
    """Stands for a kill of the process."""


def call(script, *words):
    """Run main() of a script in this process, with these words on its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__name__, *map(str, words)])
        script.main()


def tiny(script, folder):
    """Words for a short run of a script on folder/toy that writes to folder/out."""
    words = [*TINY[script], "--out", folder / "out"]
    if script is not eval_libero:
        words += ["--data", folder / "toy/hand", folder / "toy/robot"]
    return words


def error_of(script, *words):
    """main() must leave with status 2 and one line on stderr, which begins with "error: "; returns
    that line."""
    with redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        call(script, *words)
    text = stderr.getvalue()
    assert stop.value.code == 2
    assert text.startswith("error: ")
    assert text.count("\n") == 1 and text.endswith("\n")
    return text


def contents(folder):
    """{name: bytes} of all files under a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def checkpoint(path):
    """A checkpoint as a dict."""
    return torch.load(path, weights_only=True)


def assert_same_training(a, b):
    """Two checkpoints hold the same weights, optimizer state and log, bit by bit."""
    one, two = checkpoint(a), checkpoint(b)
    torch.testing.assert_close(one["model"], two["model"], rtol=0, atol=0)
    states = one["optimizer"]["state"], two["optimizer"]["state"]
    torch.testing.assert_close(*states, rtol=0, atol=0)
    assert one["log"] == two["log"]


def masked(lengths, longest):
    """A mask (B, longest), True at the first so many positions of each row."""
    return torch.arange(longest) < torch.tensor(lengths)[:, None]


def noise(*shape, seed=0):
    """Standard normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_hnet(stages, gap):
    """An H-Net for latents of 5 numbers with random weights everywhere: as built it is the
    identity, which hides mistakes."""
    torch.manual_seed(3)
    model = skills.HNet(5, 16, stages, 1, 3, gap).requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model.eval()


def packed(path, lengths=(6, 9, 4), splits=("train", "train", "val")):
    """A packed set with episodes a, b, c; every number of row t is t: in frames of 16 x 16, in
    actions (T, 2) and in proprio (T, 3)."""
    episodes = []
    for text, split, begin, length in zip("abc", splits, np.cumsum([0, *lengths]), lengths):
        t = np.arange(begin, begin + length)
        frames = np.tile(t.astype(np.uint8)[:, None, None, None], (1, 16, 16, 3))
        arrays = {"frames": frames, "actions": np.tile(t.astype(np.float32)[:, None], 2)}
        arrays["proprio"] = np.tile(t.astype(np.float32)[:, None], 3)
        episodes.append((text, text, split, arrays))
    data.pack(path, episodes)
    return data.Packed(path)


def agent(skill, low_text=False, cameras=1, proprio=3, target=3):
    """An untrained policy for frames of 32 x 32; skill: its width, 0 for a flat one."""
    torch.manual_seed(0)
    settings = {"width": 16, "channels": 8, "patch": 4, "layers": 1, "chunk": 4, "text": None}
    settings["low_text"] = low_text
    shape = {"size": 32, "cameras": cameras, "high_cameras": cameras, "proprio": proprio}
    return policy.Agent(shape | {"skill": skill, "target": target}, settings).eval()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a tiny toy world, toy, and a run folder, out, in which all stages ran."""
    folder = tmp_path_factory.mktemp("trained")
    data.pack_toy(folder / "toy", hand=12, demos=2)
    for script in (lam, skills, policy):
        call(script, *tiny(script, folder))
    call(policy, *tiny(policy, folder), "--variant", "flat")
    call(eval_libero, *tiny(eval_libero, folder), "--variant", "hilam", "flat")
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    """The same with a copy of the run folder, to work in."""
    (tmp_path / "toy").symlink_to(trained / "toy")
    shutil.copytree(trained / "out", tmp_path / "out")
    return tmp_path


# ------------------------------------------------------------------------------- dynamic chunking
def test_ste_is_one_forward_and_the_identity_backward():
    c = torch.tensor([0.2, 0.9], requires_grad=True)

    out = skills.ste(c)
    out.backward(torch.tensor([3.0, -5.0]))

    assert out.tolist() == [1, 1]
    assert c.grad.tolist() == [3, -5]


@pytest.mark.parametrize("least, apart", [(1, 1), (4, 1), (1, 3)])
def test_route_equals_the_loop(least, apart):
    q, k = noise(2, 20, 3), noise(2, 20, 3, seed=1)
    mask = masked([20, 9], 20)

    p, boundary = skills.route(q, k, mask, least, apart)

    for b, t in np.ndindex(2, 20):
        expected = 1.0
        if t > 0:
            cosine = torch.cosine_similarity(q[b, max(0, t - apart)], k[b, t], dim=0)
            expected = float(1 - cosine) / 2
        recent = boundary[b, max(0, t - max(least, apart) + 1) : t].any()
        assert p[b, t].item() == pytest.approx(expected, abs=1e-5)
        assert boundary[b, t] == (expected >= 0.5 and mask[b, t] and not recent)


@pytest.mark.parametrize("apart", [1, 3])
def test_gradient_of_route_is_right(apart):
    q = noise(2, 9, 3).double().requires_grad_()
    k = noise(2, 9, 3, seed=1).double().requires_grad_()

    def probability(q, k):
        return skills.route(q, k, masked([9, 5], 9), 1, apart)[0]

    assert torch.autograd.gradcheck(probability, [q, k])


def random_boundaries():
    """Probabilities (3, 40), and boundaries (3, 40) of sequences of 40, 40 and 15 positions."""
    p = 0.95 * torch.rand(3, 40, generator=torch.Generator().manual_seed(0))
    first = torch.arange(40) == 0
    return p, ((p >= 0.5) | first) & masked([40, 40, 15], 40)


def test_chunk_keeps_the_vectors_at_boundaries():
    h = noise(3, 40, 5)
    _, boundary = random_boundaries()

    z, mask, position = skills.chunk(h, boundary)

    assert mask.sum(1).tolist() == boundary.sum(1).tolist()
    assert z.shape[1] == boundary.sum(1).max()
    assert torch.equal(z[mask], h[boundary])
    assert torch.equal(position[mask], boundary.nonzero()[:, 1])


def dechunk_loop(x, p, boundary):
    """y_m = (1 - p_m) y_{m-1} + p_m x_m, one position at a time, as in H-Net's equations."""
    confidence = torch.where(boundary, p, 1 - p)[..., None]
    y = torch.zeros_like(x[:, 0])
    out = []
    for t in range(p.shape[1]):
        own = x[torch.arange(len(x)), boundary[:, : t + 1].sum(1) - 1]
        weight = (p[:, t].clamp(1e-4, 1 - 1e-4) * boundary[:, t])[:, None]
        y = (1 - weight) * y + weight * own
        out.append(y)
    return torch.stack(out, dim=1) * (1 + confidence - confidence.detach())


def test_dechunk_and_its_gradients_equal_the_loop():
    p, boundary = random_boundaries()
    z, _, position = skills.chunk(noise(3, 40, 5), boundary)
    ours = [z.clone().requires_grad_(), p.clone().requires_grad_()]
    loop = [z.clone().requires_grad_(), p.clone().requires_grad_()]

    out = skills.dechunk(*ours, boundary, position)
    expected = dechunk_loop(*loop, boundary)
    out.backward(noise(3, 40, 5, seed=1))
    expected.backward(noise(3, 40, 5, seed=1))

    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[0].grad, loop[0].grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[1].grad, loop[1].grad, rtol=1e-4, atol=1e-5)
    assert loop[1].grad.abs().max() > 0.1


@pytest.mark.parametrize(
    "marked, probability, n, loss",
    [(1, 0.25, 4, 1), (2, 0.5, 4, 4 / 3), (4, 1.0, 4, 4), (0, 0.0, 3, 1.5)],
)
def test_ratio_loss_counts_no_padding(marked, probability, n, loss):
    mask = masked([4], 6)
    boundary = masked([marked], 6) | ~mask  # at padding everything speaks for a boundary
    p = torch.where(mask, probability, 0.9)

    found, f, g = skills.ratio_loss(boundary, p, mask, n)

    assert found.item() == pytest.approx(loss, rel=1e-5)
    assert (f.item(), g.item()) == pytest.approx((marked / 4, probability))


# ------------------------------------------------------------------------------------------ H-Net
HNETS = pytest.mark.parametrize("stages, gap", [(2, 1), (3, 4)])


@HNETS
def test_hnet_cuts_neither_nothing_nor_everything_in_the_tests_below(stages, gap):
    _, routings = random_hnet(stages, gap)(noise(3, 24, 5), masked([24, 15, 9], 24))

    assert len(routings) == stages
    assert 1 < routings[-1].boundary[0].sum() < 24


@HNETS
@pytest.mark.parametrize("t", [1, 6, 8])
def test_hnet_is_causal(stages, gap, t):
    model, mask = random_hnet(stages, gap), masked([24, 15, 9], 24)
    z = noise(3, 24, 5)
    changed = z.clone()
    changed[:, t] = noise(3, 5, seed=1)

    before, routings = model(z, mask)
    after, others = model(changed, mask)

    torch.testing.assert_close(before[:, :t], after[:, :t], rtol=1e-4, atol=1e-4)
    assert (before - after)[:, t:].abs().amax((1, 2)).min() > 1e-2
    for a, b in zip(*map(skills.frame_rate, (routings, others)), strict=True):
        for one, other in zip(a, b, strict=True):
            torch.testing.assert_close(one[:, :t], other[:, :t], rtol=1e-4, atol=1e-4)


@HNETS
@pytest.mark.parametrize(
    "rows, length",
    [([0, 1, 2], 24), ([0, 1, 2], 33), ([2], 9)],
    ids=["other padding", "more padding", "no padding"],
)
def test_hnet_is_blind_to_padding(stages, gap, rows, length):
    model, mask = random_hnet(stages, gap), masked([24, 15, 9], 24)
    z = noise(3, 24, 5)
    other = torch.cat([torch.where(mask[..., None], z, noise(3, 24, 5, seed=1)), noise(3, 9, 5)], 1)
    other_mask = masked([24, 15, 9], length)[rows]

    before, routings = model(z, mask)
    after, others = model(other[rows, :length], other_mask)

    torch.testing.assert_close(before[rows][mask[rows]], after[other_mask], rtol=1e-4, atol=1e-4)
    marks, _ = skills.frame_rate(routings)
    other_marks, _ = skills.frame_rate(others)
    for a, b in zip(marks, other_marks, strict=True):
        assert torch.equal(a[rows][mask[rows]], b[other_mask])
        assert not b[~other_mask].any()


@HNETS
def test_skills_at_frame_rate_equal_the_loop(stages, gap):
    model = random_hnet(stages, gap)
    lengths = {0: 30, 30: 17}  # of the episodes, by their first row
    dataset = SimpleNamespace(name="set", start=np.array([0, 30]), length=np.array([30, 17]))
    latents = noise(47, 5)

    boundaries, vectors, _ = skills.segment(model, dataset, latents.numpy(), gap, "cpu")

    for start, length in lengths.items():
        known = length - gap
        _, routings = model(latents[None, start : start + known], masked([known], known))
        frames = list(range(known))  # at which the stage has a position
        for stage, routing in enumerate(routings):
            for t in range(length):
                position = max(j for j, frame in enumerate(frames) if frame <= t)
                expected = routing.vectors[0, position]
                assert np.allclose(vectors[stage][start + t], expected, atol=1e-4)
            frames = [frames[j] for j in routing.boundary[0].nonzero()[:, 0].tolist()]
            found = np.flatnonzero(boundaries[start : start + length, stage])
            assert found.tolist() == frames


def test_prediction_of_segment_is_the_networks():
    model = random_hnet(2, 1)
    dataset = SimpleNamespace(name="set", start=np.array([0, 30]), length=np.array([30, 17]))
    latents = noise(47, 5)

    _, _, prediction = skills.segment(model, dataset, latents.numpy(), 1, "cpu")

    expected, _ = model(latents[None, 30:46], masked([16], 16))
    assert np.allclose(prediction[30:46], expected[0], atol=1e-4)


BOUNDARY = np.array([1, 0, 0, 1, 1, 0, 0, 0, 1, 0], bool)
SEGMENTS = [range(0, 3), range(3, 4), range(4, 8), range(8, 10)]


def test_first_skill_is_the_vector_at_the_segments_first_frame():
    vectors = noise(10, 4).numpy()

    found = skills.skill_vectors(vectors, BOUNDARY, "first")

    for segment in SEGMENTS:
        for t in segment:
            assert np.array_equal(found[t], vectors[segment[0]])


def test_ahead_skill_is_the_mean_from_the_frame_to_the_segments_end():
    vectors = noise(10, 4).numpy()

    found = skills.skill_vectors(vectors, BOUNDARY, "ahead")

    for segment in SEGMENTS:
        for t in segment:
            assert np.allclose(found[t], vectors[t : segment[-1] + 1].mean(0), atol=1e-6)


def test_uniform_boundaries_are_as_many_in_each_episode_and_as_far_apart():
    boundary = np.zeros(29, bool)
    boundary[[0, 1, 2, 3, 20, 28]] = True

    uniform = skills.uniform_boundaries(boundary, [0, 20], [20, 9])

    assert np.flatnonzero(uniform).tolist() == [0, 5, 10, 15, 20, 24]


def test_events_are_the_middles_of_grasps_and_releases_and_other_changes():
    names = ["reach", "grasp", "carry", "release"]
    phase = np.repeat([0, 1, 2, 0, 3, 0], [4, 3, 5, 6, 5, 2])

    found = skills.events(phase, names)

    assert found.tolist() == [5, 12, 20]  # middle of grasp; carry to reach; middle of release


def test_f1_score_matches_as_many_boundaries_as_can_be():
    found = [np.array([4, 6, 30]), np.array([], int)]
    true = [np.array([6, 8]), np.array([11])]  # 4 must take 6, and leave 8 to 6

    assert skills.f1_score(found, true) == pytest.approx(2 * 2 / (3 + 3), abs=1e-4)


def test_f1_score_is_zero_without_boundaries_near_events():
    assert skills.f1_score([np.array([5])], [np.array([8])]) == 0


def test_peaks_are_the_highest_changes_of_direction():
    angle = np.array([0, 0.1, 1.5, 1.6, 1.7, 2.5, 2.6, 2.7, 2.9, 3.0])
    z = np.stack([np.cos(angle), np.sin(angle)], axis=1)

    assert skills.peaks(z, 2).tolist() == [2, 5]
    assert skills.peaks(z, 3).tolist() == [2, 5, 8]


class ShiftLAM:
    """Stands for a frozen LAM: its FDM adds the latent to the frame, so the true latent of frames
    that count is the gap."""

    gap = 2

    def frames(self, dataset, rows, device):
        """Frames as single numbers."""
        return torch.from_numpy(dataset[rows]).float()[:, None]

    def fdm(self, now, z):
        """The frame after z."""
        return now + z


@pytest.mark.parametrize("off", [0.0, 0.5])
def test_reconstruction_decodes_the_next_latent_from_the_next_frame(off):
    frames = np.cumsum(np.arange(40))  # each change is another
    change = torch.from_numpy(frames[2:] - frames[:-2]).float()  # (38,) the true latents
    prediction = ((change[1:21] + off - 3) / 2).view(1, 20, 1)  # at t of z_{t+1}, standardised
    scale = [(torch.tensor([3.0]), 2.0)]
    copy = np.square(frames[2:] - frames[:-2]).mean()

    loss = skills.reconstruction(
        ShiftLAM(),
        prediction,
        torch.ones(1, 20, dtype=torch.bool),
        np.arange(20)[None],
        np.zeros(1, int),
        [frames],
        scale,
        np.random.default_rng(0),
    )

    assert loss.item() == 0 if off == 0 else 0 < loss.item() < 0.5**2 / 2**2
    assert copy > 4


# ----------------------------------------------------------------------------- latent action model
def test_odd_half_of_a_latent_changes_sign_under_time_reversal():
    torch.manual_seed(0)
    idm = lam.IDM(6, 32, 8, 8, True)
    a, b = torch.rand(2, 3, 6, 32, 32)

    forward, backward = idm(a, b), idm(b, a)

    torch.testing.assert_close(forward[:, :4], -backward[:, :4], rtol=0, atol=1e-5)
    assert forward[:, :4].abs().min() > 1e-4
    assert (forward + backward)[:, 4:].abs().max() > 0.1


def test_odd_half_of_a_latent_is_zero_where_nothing_moves():
    torch.manual_seed(0)
    idm = lam.IDM(3, 16, 8, 8, True)
    a = torch.rand(3, 3, 16, 16)

    z = idm(a, a)

    assert z[:, :4].abs().max() < 1e-5
    assert z[:, 4:].abs().max() > 0.1


def test_warp_moves_both_frames_alike():
    torch.manual_seed(0)
    a = torch.rand(3, 6, 32, 32)

    x, y = lam.warp(a, a, 0.4)

    assert torch.equal(x, y)
    assert (x - a).abs().mean() > 0.05


def test_warp_of_no_strength_is_nearly_the_identity():
    a, b = torch.rand(2, 3, 6, 32, 32)

    x, y = lam.warp(a, b, 1e-6)

    torch.testing.assert_close((x, y), (a, b), rtol=0, atol=1e-3)


def small_lam(gap):
    """An untrained LAM for frames of 16 x 16."""
    torch.manual_seed(0)
    settings = {"wrist": False, "gap": gap, "latent": 4, "width": 8, "odd": False}
    return lam.LAM(settings, 16)


@pytest.mark.parametrize("reverse", [False, True])
def test_get_batch_pairs_frames_k_apart_and_every_other_backwards(tmp_path, reverse):
    dataset = packed(tmp_path / "set")
    rows = dataset.rows([0, 1], 4)

    pair = lam.get_batch(
        small_lam(4), [dataset], [rows], 8, reverse, np.random.default_rng(0), "cpu"
    )

    now, future = (255 * frames[:, 0, 0, 0] for frames in pair)  # a pixel is its row
    steps = [4, -4] * 4 if reverse else [4] * 8
    assert (future - now).round().tolist() == steps
    assert set(torch.minimum(now, future).round().tolist()) <= set(rows.tolist())


def test_encode_writes_zeros_where_there_is_no_frame_t_plus_k(tmp_path):
    dataset = packed(tmp_path / "set")

    latents = lam.encode(small_lam(4), dataset, "cpu")

    assert np.flatnonzero(latents.any(1)).tolist() == [0, 1, 6, 7, 8, 9, 10]


def test_latent_of_a_row_is_the_idms_of_frames_t_and_t_plus_k(tmp_path):
    dataset = packed(tmp_path / "set")
    model = small_lam(4)

    latents = lam.encode(model, dataset, "cpu")

    frames = model.frames(dataset, np.array([7, 11]), "cpu")
    expected = model.idm(frames[:1], frames[1:])
    torch.testing.assert_close(torch.from_numpy(latents[7:8]), expected, rtol=1e-4, atol=1e-5)


def toy_sets(folder):
    """The hand's and the robot's packed sets."""
    return [data.Packed(folder / "toy/hand"), data.Packed(folder / "toy/robot")]


@pytest.mark.parametrize("gap", [1, 3])
def test_probe_reads_true_motion_from_motion(trained, gap):
    sets = toy_sets(trained)
    latents = []
    for dataset in sets:
        ahead = np.concatenate([dataset.open("truth_motion"), np.zeros((gap, 3))])
        latents.append(sum(ahead[i : i + dataset.total] for i in range(gap)))

    figures = lam.probe(sets, latents, gap)

    assert min(figures["transfer_r2"]) > 0.99
    assert figures["gripper_f1"] > 0.9
    assert min(figures["action_r2"][:2]) > 0.8


def test_probe_reads_nothing_from_a_random_latent(trained):
    sets = toy_sets(trained)
    latents = [noise(dataset.total, 8).numpy() for dataset in sets]

    figures = lam.probe(sets, latents, 1)

    assert max(figures["action_r2"]) < 0.1
    assert max(figures["transfer_r2"]) < 0.1
    assert figures["gripper_f1"] < 0.3
