"""Tests: python -m pytest -q test_all.py. Speed of chunking (pip install h-net-dynamic-chunking==0.5.19), of LIBERO: python test_all.py [--libero]"""
import argparse, contextlib, importlib.util, io, itertools, json, os, shutil, subprocess, sys, tempfile, time, unittest.mock
from pathlib import Path
import numpy as np, PIL.Image, pytest, torch, data, eval_libero, lam, policy, skills
os.environ["OMP_NUM_THREADS"], _ = "1", torch.set_num_threads(1)   # one thread here and in the scripts started below: sums run in one order
TINY = {lam: ["--steps", 4, "--save-every", 2, "--batch", 8], skills: ["--steps", 4, "--save-every", 2, "--batch", 4],
        policy: ["--steps", 4, "--pretrain-steps", 4, "--save-every", 2, "--batch", 8, "--demos", 1, "--warp", 0.1],
        eval_libero: ["--demos", 1, "--tasks", 0, 3, "--episodes", 1, "--max-steps", 6]}
WIDTHS = pytest.mark.parametrize("widths", [[16, 16, 16], [16, 20, 24, 28]])       # two stages, k = 1; three that grow, k = 4
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data.pack_toy((folder := tmp_path_factory.mktemp("run")) / "data/toy", hand=12, demos=2)       # a tiny toy set; all stages run on it
    [subprocess.run([sys.executable, module.__file__, *map(str, words)], cwd=folder, check=True) for module, words in TINY.items()]
    return folder
@pytest.fixture
def out(run, tmp_path, monkeypatch):
    return monkeypatch.chdir(run) or Path(shutil.copytree("out/toy", tmp_path / "out"))    # a copy to work in; the data stay where they are
def call(module, *words):                                          # call(lam, "--steps", 4): main() in this process
    with unittest.mock.patch.object(sys, "argv", [module.__name__, *map(str, words)]): module.main()
def error(module, *words):                                         # main() must leave with status 2 and one line on stderr, returned here
    with contextlib.redirect_stderr(io.StringIO()) as stderr, pytest.raises(SystemExit) as stop:
        call(module, *words)
    assert stop.value.code == 2 and (text := stderr.getvalue()).startswith("error: ") and text.count("\n") == 1, text
    return text
checkpoint = lambda path: torch.load(path, weights_only=True)
contents = lambda folder: {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
def random_hnet(widths, latent=5):
    torch.manual_seed(3)                                           # all weights random: as built, blocks are the identity and hide mistakes
    model = skills.HNet(latent, list(widths), len(widths) - 1, 1, 3, 4 * (len(widths) > 3)).requires_grad_(False)
    [parameter.normal_(std=0.3) for parameter in model.parameters()]
    return model.eval()
@pytest.mark.parametrize("least, apart", [(1, 1), (4, 1), (1, 3)])
def test_route(least, apart):
    q, k, mask = *torch.randn(2, 2, 20, 3, generator=torch.Generator().manual_seed(0)), torch.arange(20) < torch.tensor([[20], [9]])
    p, boundary = skills.route(q, k, mask, least, apart)
    for b, t in np.ndindex(2, 20):
        expected = 1 if t == 0 else float(1 - torch.cosine_similarity(q[b, max(0, t - apart)], k[b, t], 0)) / 2
        fresh = mask[b, t] and not boundary[b, max(0, t - max(least, apart) + 1):t].any()
        assert p[b, t].item() == pytest.approx(expected, abs=1e-5) and boundary[b, t] == (expected >= 0.5 and fresh)
    assert torch.autograd.gradcheck(lambda *qk: skills.route(*qk, mask, least, apart)[0], [x.double().requires_grad_() for x in (q, k)])
def test_chunk_and_dechunk_equal_the_loop():
    _, h, p, weight, results = torch.manual_seed(0), torch.randn(3, 40, 5), 0.95 * torch.rand(3, 40), torch.randn(3, 40, 5), []
    boundary = ((p >= 0.5) | (torch.arange(40) == 0)) & (torch.arange(40) < torch.tensor([[40], [40], [15]]))
    z, mask, position = skills.chunk(h, boundary)
    assert torch.equal(z[mask], h[boundary]) and mask.sum(1).tolist() == boundary.sum(1).tolist() and z.shape[1] == boundary.sum(1).max()
    def loop(x, p):                                                # y_m = (1 - p_m) y_{m-1} + p_m x_m, one position at a time
        y, m, c = [torch.zeros(3, 5)], boundary.cumsum(1) - 1, torch.where(boundary, p, 1 - p)[..., None]
        for t in range(40):
            w = (p[:, t].clamp(1e-4, 1 - 1e-4) * boundary[:, t])[:, None]
            y.append((1 - w) * y[-1] + w * x[range(3), m[:, t]])
        return torch.stack(y[1:], 1) * (1 + c - c.detach())        # times 1, with the gradient of c: straight through
    for function in (lambda x, p: skills.dechunk(x, p, boundary, position), loop):
        (out := function(x := z.clone().requires_grad_(), q := p.clone().requires_grad_())).backward(weight)
        results.append((out, x.grad, q.grad))
    assert all(torch.allclose(ours, true, atol=1e-5) and true.abs().max() > 0.1 for ours, true in zip(*results))
@pytest.mark.parametrize("marked, probability, n, expected", [(1, 0.25, 4, 1), (2, 0.5, 4, 4 / 3), (4, 1.0, 4, 4), (0, 0.0, 3, 1.5)])
def test_ratio_loss(marked, probability, n, expected):
    boundary, mask, p = (at := torch.arange(6)[None]) < marked, at < 4, torch.where(at < 4, probability, 0.9)      # padding must not count
    assert [x.item() for x in skills.ratio_loss(boundary, p, mask, n)] == pytest.approx([expected, marked / 4, probability], rel=1e-5)
@WIDTHS
def test_hnet_is_causal_and_blind_to_padding(widths):
    model, z, mask = random_hnet(widths), torch.randn(3, 24, 5), torch.arange(24) < torch.tensor([[24], [15], [9]])
    before, routings = model(z, mask)
    assert [r.token.shape[-1] for r in routings] == widths[:-1] and 1 < routings[-1].boundary[0].sum() < 24
    marks = skills.frame_rate(routings)[0]
    for t in (1, 6, 8):                                            # a changed latent changes predictions from then on, and none before
        after, others = model(torch.cat([z[:, :t], torch.randn(3, 1, 5), z[:, t + 1:]], 1), mask)
        assert torch.allclose(before[:, :t], after[:, :t], atol=1e-4) and (before - after)[:, t:].abs().amax((1, 2)).min() > 1e-2
        assert all(torch.equal(a[:, :t], b[:, :t]) for a, b in zip(marks, skills.frame_rate(others)[0]))
    longer = torch.cat([torch.where(mask[..., None], z, torch.randn_like(z)), torch.randn(3, 9, 5)], 1)
    for rows, length in (([0, 1, 2], 24), ([0, 1, 2], 33), ([2], 9)):      # other padding, more padding, and an episode on its own
        after, others = model(longer[rows, :length], m := torch.nn.functional.pad(mask, (0, 9))[rows, :length])
        assert torch.allclose(before[rows][mask[rows]], after[m], atol=1e-4)
        assert all(torch.equal(a[rows][mask[rows]], b[m]) and not b[~m].any() for a, b in zip(marks, skills.frame_rate(others)[0]))
@WIDTHS
def test_skills_at_frame_rate_equal_the_loop(widths):
    dataset, model, gap = argparse.Namespace(start=np.array([0, 30]), length=np.array([30, 17]), total=47), random_hnet(widths), 3
    latent = np.random.default_rng(0).standard_normal((47, 5)).astype(np.float32)
    boundaries, vectors, _ = skills.segment(model, dataset, latent, gap, "cpu")
    for start, length in ((0, 30), (30, 17)):
        at = list(range(length - gap))                             # the frame of each position of a stage
        _, routings = model(torch.from_numpy(latent[start:start + length - gap])[None], torch.ones(1, length - gap, dtype=torch.bool))
        for stage, r in enumerate(routings):                       # a boundary of a stage is one of every stage below
            kept = [j for j in range(len(at)) if r.boundary[0, j]]
            assert np.flatnonzero(boundaries[start:start + length, stage]).tolist() == [at[j] for j in kept]
            for t in range(length):
                assert np.allclose(vectors[stage][start + t], r.token[0, max(j for j in kept if at[j] <= t)], atol=1e-4)
            at = [at[j] for j in kept]
    assert all(np.array_equal((np.diff(v, axis=0) != 0).any(1), b[1:]) for v, b in zip(vectors, boundaries.T))     # one segment, one skill
@pytest.mark.parametrize("size", (32, 64))                         # the coarser grid and the finer one
def test_odd_latents_and_warped_pairs(size):
    torch.manual_seed(0), (a := torch.rand(3, 6, size, size)), (b := torch.rand(3, 6, size, size))
    sum_, (x, y) = (idm := lam.IDM(6, size, 8, 8, True))(a, b) + idm(b, a), lam.warp([a, a], 0.4)  # half of z is odd: z(a, b) = -z(b, a)
    assert sum_[:, :4].abs().max() < 1e-5 < 0.1 < sum_[:, 4:].abs().max() and idm(a, a)[:, :4].abs().max() < 1e-5
    assert torch.equal(x, y) and (x - a).abs().mean() > 0.05 and torch.allclose(lam.warp([a, b], 1e-6)[1], b, atol=1e-3)
    assert lam.Moments()(9 * torch.eye(9)[2].view(1, 1, 3, 3)).tolist() == [[1, 1, -1]]       # a point above, on the right: mean, x, y
def test_probes_and_scores_of_what_is_known(run):
    sets = [data.Packed(run / "data/toy" / name) for name in ("hand", "robot")]
    moved, placed = (lam.probe(sets, [np.array(s.truth(key)) for s in sets], 1) for key in ("motion", "layout"))
    assert min(moved["transfer_r2"]) > 0.99 and moved["gripper_f1"] > 0.9 and moved["layout_r2"] < 0.2
    assert max(placed["transfer_r2"]) < 0.5 and placed["gripper_f1"] < 0.5 and placed["layout_r2"] > 0.95
    vectors = [[np.eye(8)[s.truth("phase")] * np.arange(1.0, 9) ** power + power] for s, power in zip(sets, (1, -1))]
    found = skills.score(sets, [v for v, in vectors], [np.diff(v.argmax(1), prepend=-1)[:, None] != 0 for v, in vectors], vectors, 1)
    assert found["skill_retrieval"] == found["skill_retrieval_other_set"] == [1]       # each body shifts and stretches the vectors its way
def test_pack_round_trip_and_targets(tmp_path):
    rng, first = np.random.default_rng(0), np.random.default_rng(0).choice([0, 1, 6, 9], 8)
    arrays = [dict(frames=rng.integers(0, 256, (n, 16, 16, 3), np.uint8), actions=rng.random((n, 2), np.float32)) for n in (6, 9, 4)]
    packed = data.pack(tmp_path / "set", zip("abc", "abc", ["train", "train", "val"], arrays)) or data.Packed(tmp_path / "set")
    assert [(e["start"], e["text"], e["split"]) for e in packed.episodes] == [(0, "a", "train"), (6, "b", "train"), (15, "c", "val")]
    assert all(np.array_equal(getattr(packed, key), np.concatenate([a[key] for a in arrays])) for key in ("frames", "actions"))
    assert all(packed.rows([0, 1], gap).tolist() == [s + j for s, n in ((0, 6), (6, 9)) for j in range(n - gap)] for gap in (0, 1, 5, 7))
    for back, k, gaps in ((0, None, [4] * 8), (1, None, [4, -4] * 4), (1, [1, 2], [4, -4, 1, -1, 2, -2, 4, -4])):     # --reverse, --shorter
        args, gaps = argparse.Namespace(batch=8, gap=4, shorter=k, wrist=False, reverse=back), np.array(gaps)
        *pair, parts = lam.get_batch([packed], [[0, 1, 6, 9]], args, np.random.default_rng(0), "cpu")
        expected = [lam.images(packed, first + np.maximum(x, 0), False, "cpu") for x in (-gaps, gaps)]
        assert all(map(torch.equal, pair, expected)) and [{*np.abs(gaps)[part]} for part in parts] == [{x} for x in sorted([4, *(k or [])])]
    rows, end = np.array([0, 4, 5, 14, 18]), np.array([5, 5, 5, 14, 18])   # the policy's targets stop at the episode's end
    _, _, _, target, mask, _ = policy.Labels(packed, [0, 1, 2], np.array(packed.actions), gap=1).batch(rows, 4, 1, "cpu")
    assert np.array_equal(mask, rows[:, None] + np.arange(4) < end[:, None])
    assert np.array_equal(target[mask], np.concatenate([packed.actions[r:min(r + 4, e)] for r, e in zip(rows, end)]))
    assert policy.l1(torch.where(mask[..., None], target + 0.5, 1e6), target, mask).item() == pytest.approx(0.5)
@pytest.mark.parametrize("gap, shorter, key", [(1, None, ""), (4, [1], 1)])        # if latents are the motion, one demonstration is enough
def test_actions_decoded_from_latents(run, tmp_path, gap, shorter, key):
    sets = [data.Packed(run / "data/toy" / name) for name in ("hand", "robot")]
    junk = lambda s: np.repeat(np.random.default_rng(0).normal(size=(s.total // 16 + 1, 24)), 16, 0)[:s.total]     # what does not matter
    [np.save(tmp_path / f"latents{k}.{s.name}.npy", np.c_[s.truth("motion"), junk(s)] * (k == key)) for s in sets for k in ("", key)]
    labels = [policy.Labels(sets[1], sets[1].chosen(1), np.pad(sets[1].actions, ((0, 0), (0, 1))))]       # one number never changes
    for part in policy.decoded(argparse.Namespace(out=tmp_path, gap=gap, shorter=shorter, seed=0, text=None, video=None), sets, labels):
        assert np.abs(part.target[:, :2] - (true := part.dataset.truth("motion")[:, :2] / data.MAX_STEP)).mean() < 0.1 * np.abs(true).mean()
    assert part.dataset is sets[1] and np.array_equal(*(p.target[labels[0].rows] for p in (part, labels[0])))       # what is known stays
def test_toy_depends_on_the_seed_alone(tmp_path):
    a, b, c = (data.pack_toy(tmp_path / name, 4, 1, seed=seed) or contents(tmp_path / name) for name, seed in zip("abc", (3, 3, 4)))
    assert a == b and all(a[key] != c[key] for key in ("hand/frames.bin", "robot/frames.bin", "robot/actions.bin"))
def test_toy_demonstrations_replayed_succeed(run):
    packed, colours = data.Packed(run / "data/toy/robot"), list(data.BLOCKS) + list(data.TRAYS)
    for start, length, episode in zip(packed.start, packed.length, packed.episodes):
        goal, rows = data.GOALS[int(episode["task"])], np.arange(start, start + length)
        world, other = (data.ToyWorld("robot", 32).reset([goal], [0]) for _ in range(2))
        assert not any(other.step(packed.actions[t][None])[0] for t in rows)       # from another layout the same actions fail
        world.hand, world.objects = packed.proprio[rows[:1], :2] + 0.0, packed.truth("layout")[start].reshape(1, 6, 2) + 0.0
        for t in rows:
            assert np.allclose(world.proprio()[0], packed.proprio[t], atol=1e-4)
            assert np.abs(world.frames()[0] - packed.frames[t].astype(int)).max() <= 2
            success = world.step(packed.actions[t][None])[0]
        assert success and length < data.TOY_LIMIT and episode["text"] == data.toy_text(goal) and goal in data.TASKS
        blocks, trays = ([colours.index(episode["text"].split()[i]) for i in at] for at in ((2, 10), (6, 14)))
        assert np.abs(world.objects[0, blocks] - world.objects[0, trays]).max() < data.TRAY_HALF       # as the text says
def write_libero(folder, demos=12, frames=5, **change):            # official schema; row j of demo i can be told in every array
    h5py, j, _ = pytest.importorskip("h5py"), np.arange(frames)[:, None], folder.mkdir()
    with h5py.File(path := folder / "put_the_bowl_on_the_stove_demo.hdf5", "w") as file:
        file.create_group("data").attrs["problem_info"] = json.dumps(dict(language_instruction="put the bowl on the stove"))
        for i in range(demos):
            image = lambda value: np.tile(value.astype(np.uint8)[:, :, None, None], (1, 16, 16, 3))
            arrays = {"actions": np.repeat(i + j / 100, 7, 1), "states": j, "robot_states": j, "rewards": j[:, 0], "dones": j[:, 0],
                      "obs/joint_states": np.repeat(i + j / 10, 7, 1), "obs/gripper_states": np.repeat(-i - j / 10, 2, 1),
                      "obs/agentview_rgb": image(10 * i + j), "obs/eye_in_hand_rgb": image(255 - 10 * i - j)} | change
            [file.create_dataset(f"data/demo_{i}/{name}", data=array) for name, array in arrays.items() if array is not None]
    return path
def test_libero_import(tmp_path):
    call(data, "libero", "--src", write_libero(tmp_path / "raw").parent, "--out", tmp_path / "set", "--size", 16)
    packed = data.Packed(tmp_path / "set")
    assert packed.length.tolist() == [4] * 12 and {e["text"] for e in packed.episodes} == {"put the bowl on the stove"}
    for t, (i, j) in enumerate((i, j) for i in range(12) for j in range(4)):       # in numeric order: demo_10 comes after demo_9
        assert (packed.frames[t] == 10 * i + j).all() and (packed.wrist[t] == 255 - 10 * i - j).all()
        assert np.allclose(packed.proprio[t], [i + j / 10] * 7 + [-i - j / 10] * 2)
        assert np.allclose(packed.actions[t], [i + (j + 1) / 100] * 7)     # obs[j] was seen after actions[j], so the next is to be learnt
    call(data, "libero", "--src", tmp_path / "raw", "--out", tmp_path / "video", "--size", 32, "--actions", "none", "--demos", 11)
    assert (video := data.Packed(tmp_path / "video")).actions is None and video.proprio is None
    assert video.frames.shape == (44, 32, 32, 3) and (video.frames[43] == 103).all()
def test_video_import(tmp_path):
    pytest.importorskip("av"), (tmp_path / "raw/201").mkdir(parents=True)
    grey = [PIL.Image.new("RGB", (40, 30), (50 * i,) * 3) for i in range(5)]
    grey[0].save(tmp_path / "raw/35.gif", save_all=True, append_images=grey[1:], duration=40)
    [image.save(tmp_path / f"raw/201/{i:04d}.png") for i, image in enumerate(grey)]
    (tmp_path / "labels.json").write_text('[{"id":"35", "label":"pushing a cup", "template":"P"}, {"id":"201", "label":"holding a pen"}]')
    call(data, "video", "--src", tmp_path / "raw", "--labels", tmp_path / "labels.json", "--out", tmp_path / "set", "--size", 16)
    assert (d := data.Packed(tmp_path / "set")).actions is None and [e["text"] for e in d.episodes] == ["holding a pen", "pushing a cup"]
    assert np.abs(d.frames[:, 8, 8, 0].astype(int) - 50 * np.tile(range(5), 2)).max() <= 3
def test_what_the_stages_write(run, out):
    reports = {p.stem: json.loads(p.read_text()) for p in out.glob("*.json")}
    assert all(set(reports["policy"][k]) == {"policy_pretrain_z2_z0", "policy_hilam_1", "policy_flat_1"} for k in ("losses", "seconds"))
    assert set(reports["eval_toy_flat"]["per_task"]) == {"0", "3"} and reports["eval_toy_flat"]["episodes"] == 2
    for packed in (data.Packed(run / "data/toy" / name) for name in ("hand", "robot")):
        assert (packed.actions is None) == (packed.proprio is None) == (packed.name == "hand")
        arrays = {key: np.load(out / f"{key}.{packed.name}.npy") for key in ("latents", "skills1", "skills2", "boundaries")}
        assert all(len(a) == packed.total and np.isfinite(a).all() and a.std() > 0 for a in arrays.values())
        assert arrays["boundaries"].shape[1] == 2 and arrays["boundaries"][packed.start].all()
        found, shuffled, constant, uniform = (policy.load_stage(packed, out, 1, control) for control in (None, *policy.CONTROLS))
        cuts = [set(np.flatnonzero((np.diff(x, axis=0) != 0).any(1)) + 1) for x in (found, shuffled, constant, uniform)]
        assert cuts[0] == cuts[1] and (found != shuffled).mean() > 0.5 and {*map(bytes, found)} == {*map(bytes, shuffled)} and not cuts[2]
        assert all(len({*np.diff(sorted(cuts[3] & {*range(s, s + n)}))}) < 2 for s, n in zip(packed.start, packed.length))
    for name in ("lam.png", "skills.png", "policy.png", "eval_toy_hilam_task3_failure.gif", "eval_toy_flat_task0_failure.gif"):
        assert np.ptp(np.asarray(PIL.Image.open(out / name).convert("L"))) > 50
    old, new = (checkpoint(out / f"policy_{name}.pt")["model"] for name in ("pretrain_z2_z0", "hilam_1"))
    high, low = ([torch.equal(v, new[k]) for k, v in old.items() if k.startswith(level)] for level in ("high", "low"))
    assert len(high) > 10 and all(high) and np.mean(low) < 0.5     # in fine-tuning only the low level learns
    for agent in (policy.load_agent(out, name, 1, "cpu") for name in ("hilam", "flat")):       # alone (traced) it acts as among others
        act = lambda rows: agent.act(packed.frames[rows], None, packed.proprio[rows], [data.toy_text(data.TASKS[t]) for t in rows])
        for several, *ones in zip(act(np.arange(8)), *(act(np.array([t])) for t in range(8))):
            np.testing.assert_allclose(np.concatenate(ones), several, atol=1e-5)
def test_sentences_read_by_a_t5(out, tmp_path):
    transformers, tokenizers, text = pytest.importorskip("transformers"), pytest.importorskip("tokenizers"), data.toy_text(data.TASKS[0])
    words, folder = {word: i for i, word in enumerate(dict.fromkeys(f"<unk> {text}".split()))}, str(tmp_path / "t5")
    (tokenizer := tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "<unk>"))).pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    encoder = transformers.T5EncoderModel(transformers.T5Config(vocab_size=99, d_model=24, d_ff=16, num_layers=1, num_heads=2)).eval()
    [x.save_pretrained(folder) for x in (transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"), encoder)]
    states = encoder(torch.tensor([[words[word] for word in text.split()]])).last_hidden_state[0]
    torch.testing.assert_close(policy.tokenize(text, folder), states.mean(0).detach())
    [call(policy, "--out", out, *TINY[policy], "--variant", "flat_z0", "--text", folder, "--layers", 0) for _ in range(2)]
    assert policy.load_agent(out, "flat_z0", 1, "cpu").text.words.in_features == 24
    assert "no-t5" in error(policy, "--out", out, *TINY[policy], "--variant", "flat_z2", "--text", tmp_path / "no-t5")
def test_three_stages_on_clips_shorter_than_the_gap(tmp_path):
    clips = [dict(frames=np.random.default_rng(0).integers(0, 256, (n, 16, 16, 3), np.uint8)) for n in (20, 14, 4, 6)]
    data.pack(tmp_path / "video", zip("abcd", "abcd", ["val", "train", "train", "train"], clips))
    call(lam, "--data", tmp_path / "video", "--out", tmp_path, *TINY[lam], "--gap", 5)
    call(skills, "--data", tmp_path / "video", "--out", tmp_path, *TINY[skills], "--chunk", 4, 2, 2, "--width", 16, 20, 24, 28)
    assert np.load(tmp_path / "skills3.video.npy").shape == (44, 24) and np.load(tmp_path / "boundaries.video.npy").shape == (44, 3)
    assert json.loads((tmp_path / "lam.json").read_text())["action_r2_mean"] is None       # there are no actions to compare with
@pytest.mark.parametrize("module, names", [(lam, ["lam"]), (skills, ["skills"]), (policy, ["policy_pretrain_z2_z0", "policy_hilam_1"])])
def test_interrupted_training_ends_in_the_same_weights(out, monkeypatch, module, names):
    save, whole = module.save_checkpoint, {name: checkpoint(out / f"{name}.pt") for name in names}
    words = ["--out", out, *TINY[module], *["--variant", "hilam"] * (module is policy)]
    [(out / f"{name}.pt").unlink() for name in names]
    monkeypatch.setattr(module, "save_checkpoint", lambda *words, **more: (save(*words, **more), sys.exit("killed")))
    for _ in range(2 * len(names)):                                # after each of its checkpoints
        assert pytest.raises(SystemExit, call, module, *words).value.code == "killed"
    call(module, *words)
    for a, b in ((checkpoint(out / f"{name}.pt"), whole[name]) for name in names):
        torch.testing.assert_close(*((c["model"], c["optimizer"]["state"]) for c in (a, b)), rtol=0, atol=0)
def test_two_processes_equal_one_with_twice_the_batch(run, tmp_path):
    for name, start, batch in (("one", [], 8), ("two", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"], 4)):
        for job in ([lam.__file__], [skills.__file__, "--rec=0"]):
            subprocess.run([sys.executable, *start, *job, "--steps=4", f"--batch={batch}", f"--out={tmp_path / name}"], cwd=run, check=True)
    for stage in ("lam", "skills"):                                # Adam's means of the gradients: those of the whole batch
        one, two = ([s["exp_avg"] for s in checkpoint(p)["optimizer"]["state"].values()] for p in sorted(tmp_path.glob(f"*/{stage}.pt")))
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)
def test_interrupted_evaluation_goes_on(out):
    log, words = out / "eval_toy_flat.jsonl", ["--out", out, "--variant", "flat", *TINY[eval_libero]]
    first, second = log.read_text().splitlines()
    log.write_text((changed := json.dumps(json.loads(first) | dict(success=True))) + "\n" + second[:30])   # the kill cut a line
    call(eval_libero, *words)
    text, report = log.read_text(), json.loads((out / "eval_toy_flat.json").read_text())
    assert text.startswith(changed) and second in text and report["success_rate"] == 0.5
    assert call(eval_libero, *words) or log.read_text() == text    # now nothing was left to run
def test_success_and_its_interval(out, monkeypatch):
    monkeypatch.setattr(data.ToyWorld, "success", lambda world: (world.goals == data.TASKS[3]).all(1))
    call(eval_libero, "--out", out, "--variant", "flat", *TINY[eval_libero], "--execute", 2)
    lines, report = (out / "eval_toy_flat.jsonl").read_text().splitlines(), json.loads((out / "eval_toy_flat.json").read_text())
    assert {(r["task"], r["success"], r["steps"]) for r in map(json.loads, lines[-2:])} == {(0, False, 6), (3, True, 1)}
    assert report["per_task"]["3"]["success_rate"] == 1 and report["ci95"] == pytest.approx([0.0945, 0.9055], abs=1e-4)
edit = lambda path, key, change: torch.save(checkpoint(path) | {key: change(checkpoint(path)[key])}, path)
BROKEN = {                                                         # what is broken in the run folder; the stage that notices; what it says
    "other stage": (lambda out: shutil.copy(out / "lam.pt", out / "skills.pt"), skills, "checkpoint of lam, not of skills"),
    "other shape": (lambda out: edit(out / "lam.pt", "model", lambda m: {k: v[:1] for k, v in m.items()}), lam, "another shape"),
    "corrupt": (lambda out: os.truncate(out / "lam.pt", 3000), lam, "not a readable checkpoint"),
    "no latents": (lambda out: [p.unlink() for p in out.glob("latents.*")], skills, "run `python lam.py`"),
    "other latents": (lambda out: [np.save(p, np.load(p) + 1) for p in out.glob("latents.*")], skills, "trained with data_checksum"),
    "lam.py unfinished": (lambda out: edit(out / "lam.pt", "step", lambda step: 2), skills, "stopped at step 2 of 4"),
    "skills of other data": (lambda out: np.save(out / "skills2.robot.npy", np.zeros((3, 64))), policy, "run `python skills.py`"),
    "policy.py unfinished": (lambda out: edit(out / "policy_flat_1.pt", "step", lambda step: 3), eval_libero, "stopped at step 3 of 4")}
@pytest.mark.parametrize("damage, module, says", BROKEN.values(), ids=BROKEN)
def test_broken_run_folder(out, damage, module, says):
    _, before = damage(out), contents(out)
    assert says in error(module, "--out", out, *TINY[module], *["--variant", "flat"] * (module is eval_libero)) and contents(out) == before
BAD_FILES = {                                                      # kind of import; how its source folder is made; what the error names
    "no folder": ("libero", lambda raw: None, "no such folder"),
    "truncated": ("libero", lambda raw: os.truncate(write_libero(raw), 9000), "stove_demo.hdf5"),
    "array missing": ("libero", lambda raw: write_libero(raw, **{"obs/joint_states": None}), "joint_states"),
    "other length": ("libero", lambda raw: write_libero(raw, actions=np.zeros((3, 7))), "actions"),
    "NaN": ("libero", lambda raw: write_libero(raw, actions=np.full((5, 7), np.nan)), "NaN"),
    "no videos": ("video", lambda raw: raw.mkdir(), "no .webm"),
    "unreadable video": ("video", lambda raw: (raw.mkdir(), (raw / "7.mp4").write_bytes(b"not a video" * 99)), "7.mp4"),
    "out exists": ("libero", lambda raw: (write_libero(raw), raw.with_name("set").mkdir()), "exists already")}
@pytest.mark.parametrize("kind, make, says", BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files(tmp_path, kind, make, says):
    make(tmp_path / "raw")
    assert says in error(data, kind, "--src", tmp_path / "raw", "--out", tmp_path / "set", "--size", 16)
    assert not (tmp_path / "set/episodes.json").exists()
def test_bad_arguments(out, tmp_path, monkeypatch):
    assert "nowhere" in error(lam, "--out", out, "--data", tmp_path / "nowhere")
    assert "libero_object" in error(eval_libero, "--out", out, "--suite", "libero_kitchen") and "--layers" in error(skills, "--layers", 0)
    os.truncate(shutil.copytree("data/toy/robot", tmp_path / "robot") / "frames.bin", 9999)
    assert "frames.bin" in error(lam, "--out", tmp_path / "new", "--data", tmp_path / "robot")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False), monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert all("--device cuda" in error(module, "--out", out, *words, "--device", "cuda") for module, words in TINY.items())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install" in error(eval_libero, "--out", out, "--suite", "libero_object", *TINY[eval_libero])
@pytest.mark.parametrize("execute", [1, 3, 4])
def test_ensemble_equals_the_loop(execute):
    ensemble, chunks = eval_libero.Ensemble(), np.random.default_rng(0).standard_normal((7, 2, 4, 3))      # decisions, slots, chunk, A
    for d, slots in enumerate([[5, 9]] * 4 + [[9]] * 3):           # the first episode ends earlier
        for slot, actions in zip(slots, ensemble(slots, chunks[d, -len(slots):], execute)):
            for n, action in enumerate(actions):                   # every chunk that predicted this step; older ones weigh more
                old = [(e, (d - e) * execute + n) for e in range(d + 1) if (d - e) * execute + n < 4]
                values, weights = zip(*[(chunks[e, int(slot == 9), j], np.exp(-0.01 * e * execute)) for e, j in old])
                assert np.allclose(action, np.average(values, 0, weights))
    assert eval_libero.keep_grip([[x] for x in (0.4, 0.6, -0.4, -0.6, 0.2)], -1, 0.5).ravel().tolist() == [-1, 0.6, 0.6, -0.6, -0.6]
ASSETS = [Path(p, "libero/assets/scenes") for s in [importlib.util.find_spec("libero")] if s for p in s.submodule_search_locations]
def untrained(out, *words):                                        # a policy for LIBERO, ready to act, of random weights
    args, shape = policy.get_args(words), dict(size=64, cameras=2, high_cameras=1, proprio=9, skill=8, target=7)
    model = policy.Agent(shape, args).state_dict()
    torch.save(dict(stage="policy", args=vars(args), step=args.steps, shape=shape, model=model), out / "policy_hilam_5.pt")
@pytest.mark.skipif(not any(p.exists() for p in ASSETS), reason="LIBERO or its assets are not installed")
def test_libero_episodes(tmp_path, monkeypatch):
    seen, act, *_ = [], policy.Agent.act, monkeypatch.setenv("LIBERO_CONFIG_PATH", f"{tmp_path}/config"), untrained(tmp_path, "--layers=0")
    monkeypatch.setattr(policy.Agent, "act", lambda self, *observed: seen.append([*observed, act(self, *observed)]) or seen[-1][-1])
    call(eval_libero, "--suite", "libero_object", "--variant", "hilam", "--demos", 5, "--out", tmp_path, "--tasks", 0, "--episodes", 2,
         "--max-steps", 10, "--execute", 8, "--settle", 2, "--workers", 1, "--camera", 64, "--clear", 0)
    assert json.loads((tmp_path / "eval_libero_object_hilam.json").read_text())["episodes"] == 2 and len(seen) == 4
    from libero.libero import benchmark, get_libero_path           # the same actions in the official loop give the same observations
    from libero.libero.envs import OffScreenRenderEnv              # asked as in the demonstrations; the benchmark says "pick up the ..."
    task, folder = benchmark.get_benchmark("libero_object")().get_task(0), lambda key: Path(get_libero_path(key), "libero_object")
    states = torch.load(folder("init_states") / task.init_states_file, weights_only=False)
    assert len((tmp_path / "config/config.yaml").read_text().splitlines()) == 5 and seen[0][3][0].startswith("pick the alphabet soup")
    env = OffScreenRenderEnv(bddl_file_name=str(folder("bddl_files") / task.bddl_file), camera_heights=64, camera_widths=64)
    for episode in range(2):
        env.seed(0), env.reset(), env.set_init_state(states[episode])
        for decision, actions in enumerate([np.array([[0, 0, 0, 0, 0, 0, -1.0]] * 2), seen[2 * episode][-1][0][0, :8]]):
            o = [env.step(action)[0] for action in actions][-1]
            frames, wrist, proprio, texts, _ = seen[2 * episode + decision]
            for ours, official in ((frames, o["agentview_image"]), (wrist, o["robot0_eye_in_hand_image"])):
                assert ours.shape == (1, 64, 64, 3) and official.std() > 5 and np.abs(ours[0] - official.astype(float)).mean() < 0.2
            assert np.allclose(proprio[0], [*o["robot0_joint_pos"], *o["robot0_gripper_qpos"]], atol=1e-5) and texts == seen[0][3]
    env.close()
def benchmark(runs=40):
    """Milliseconds of chunk and dechunk, forward and backward on one thread, ours and h-net-dynamic-chunking's, run in turns."""
    from h_net_dynamic_chunking import DynamicSequenceChunker       # pip install h-net-dynamic-chunking==0.5.19
    q, k, other, times = *(torch.nn.Linear(256, 256, bias=False) for _ in range(2)), DynamicSequenceChunker(256), {}
    q.weight.data, k.weight.data, other.to_queries_keys.weight.data = torch.eye(256), torch.eye(256), torch.eye(256).repeat(2, 1)
    def ours(x):                                                   # the main network is the identity in both
        p, boundary = skills.route(q(x), k(x), mask := torch.ones(x.shape[:2], dtype=torch.bool))
        z, _, position = skills.chunk(x, boundary)
        return skills.dechunk(z, p, boundary, position), 0.03 * skills.ratio_loss(boundary, p, mask, 6)[0], int(boundary.sum())
    def theirs(x):
        (z, upsample, loss), seen = other(x, return_intermediates=True)
        return upsample(z), loss, int(seen.boundary_mask.sum())
    for length, _, function in itertools.product((64, 256), range(runs), (ours, theirs)):
        sign = 1 - 2 * ((torch.arange(length) // 6 + torch.arange(16)[:, None]) % 2)[..., None]      # at a boundary the vectors turn round
        x, gradient = (sign * torch.randn(16, 1, 256) + 0.3 * torch.randn(16, length, 256)).requires_grad_(), torch.randn(16, length, 256)
        begin, (out, loss, chunks) = time.perf_counter(), function(x)
        torch.autograd.backward([out, loss], [gradient, None])
        times.setdefault((length, function.__name__, chunks), []).append(1e3 * (time.perf_counter() - begin))
    [print(f"B 16, T {key[0]}, D 256, {key[2]} chunks: {key[1]} {np.median(value[5:]):.1f} ms") for key, value in times.items()]
def libero_speed(out):
    """Environment steps a second: one environment, two images and a decision at every step, as in LIBERO's own loop; then as by default."""
    untrained(out)
    for words in (["--workers", 1, "--execute", 1, "--tasks", 0, "--episodes", 1], ["--workers", 2, "--tasks", 0, 1, "--episodes", 4]):
        call(eval_libero, "--suite", "libero_object", "--variant", "hilam", "--demos", 5, "--out", out, *words)
        print(*words, "steps/s:", json.loads((out / "eval_libero_object_hilam.json").read_text())["env_steps_per_second"])
__name__ == "__main__" and (libero_speed(Path(tempfile.mkdtemp())) if "--libero" in sys.argv else benchmark())
