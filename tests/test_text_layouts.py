"""What a backbone is told of a text or class: joining, dropping, tables, learned tokens, names."""

import json
import sys
import types

import pytest
import torch

from dfm_fast import nn
from dfm_fast._library import INTERPRET
from dfm_fast.models import ClassTokens, TextLayout, TextTable, draw_kept
from dfm_fast.models.text_layouts import (
    CLASS_NAMES,
    T2I,
    TokenStates,
    dropout_probability,
    join_states,
)
from dfm_fast.models.text_tables import DIGITS, imagenet_class_names, read_class_names
from dfm_fast.training.orders import draw

pytestmark = pytest.mark.skipif(INTERPRET, reason="no kernels in it")

SMALL = TextLayout(4, 6, 12, clip_length=5, max_tokens=7)  # D = 12, of which CLIP fills 10
LENGTHS = {"clip_l": (5, 4), "clip_g": (5, 3), "gemma": (2, 6)}  # of two texts


def some_states(layout=SMALL, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def one(name, length):
        width = getattr(layout, name)
        hidden = torch.randn(length, width, generator=generator).to(dtype)
        return TokenStates(hidden, None if name == "gemma" else hidden[0] / 2)

    return {name: [one(name, n) for n in LENGTHS[name]] for name in layout.names}


def attention(dim=12):
    torch.manual_seed(0)
    return nn.CrossAttention(16, dim, 2)


def attended(conditions, layer=None):
    """What cross-attention makes of it."""
    layer, x = (
        layer or attention(),
        torch.randn(1, 3, 16, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        return layer(x.expand(len(conditions.text), -1, -1), conditions.text, conditions.mask)


# --- Joining --------------------------------------------------------------------------------------


def test_sizes_of_the_papers_variants():
    assert (T2I.dim, T2I.pooled_dim, T2I.max_length) == (2304, 2048, 77 + 256)
    assert (CLASS_NAMES.dim, CLASS_NAMES.names, CLASS_NAMES.max_length) == (768, ("clip_l",), 77)


def test_states_lie_where_the_layout_says():
    states = some_states()
    text, mask, pooled = join_states(SMALL, states)
    assert text.shape == (2, 5 + 6, 12)
    assert mask.int().tolist() == [[1] * 5 + [1, 1, 0, 0, 0, 0], [1] * 4 + [0] + [1] * 6]
    for i in range(2):
        want = torch.zeros(11, 12)
        for name, row, column in (("clip_l", 0, 0), ("clip_g", 0, 4), ("gemma", 5, 0)):
            s = states[name][i].hidden
            want[row : row + len(s), column : column + s.shape[1]] = s
        assert torch.equal(text[i], want)
        assert torch.equal(
            pooled[i], torch.cat([states[n][i].pooled for n in ("clip_l", "clip_g")])
        )


SUBSETS = [
    tuple(name for bit, name in enumerate(SMALL.names) if subset >> bit & 1) for subset in range(8)
]


@pytest.mark.parametrize("names", SUBSETS, ids="+".join)
def test_an_encoder_that_is_missing_is_one_that_was_dropped(names):
    """In training a row of `keep`, at inference states that are not there: the same attention."""
    states = some_states()
    keep = torch.tensor([[name in names for name in SMALL.names], [True] * 3])
    trained = join_states(SMALL, states, keep)
    given = {name: states[name] for name in names}
    missing, padded = (join_states(SMALL, given, batch=2, padded=p) for p in (False, True))
    assert padded.text.shape[1] == SMALL.max_length
    assert missing.text.shape[1] <= trained.text.shape[1]
    want = attended(missing)
    torch.testing.assert_close(attended(trained)[0], want[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attended(padded), want, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(attended(trained)[1], attended(join_states(SMALL, states))[1])
    assert torch.equal(trained.pooled[0], missing.pooled[0])
    for conditions in (trained, missing, padded):
        assert not conditions.text[~conditions.mask].any()


def test_subsets_differ():
    states = some_states()
    ys = [attended(join_states(SMALL, {n: states[n] for n in s}, batch=2)) for s in SUBSETS]
    for i, a in enumerate(ys):
        for b in ys[:i]:
            assert (a - b).abs().max() > 1e-3


def test_no_token_is_the_unconditional():
    """Attention gives 0, of which to_out makes its bias: as for zeros that all are attended to."""
    layer, conditions = attention(), join_states(SMALL, some_states())
    none = conditions.unconditional()
    assert [v.shape for v in none] == [v.shape for v in conditions]
    assert not none.mask.any()
    dropped = join_states(SMALL, some_states(), torch.zeros(2, 3, dtype=torch.bool))
    assert dropped.text.shape == (2, 1, 12)
    for c in (none, dropped):
        torch.testing.assert_close(attended(c, layer), layer.to_out[0].bias.expand(2, 3, 16))
    zeros = none._replace(mask=torch.ones_like(none.mask))
    torch.testing.assert_close(attended(zeros, layer), attended(none, layer))


def test_dtype_and_device():
    states = some_states()
    states["gemma"] = [TokenStates(s.hidden.bfloat16()) for s in states["gemma"]]
    assert join_states(SMALL, states).text.dtype == torch.float32
    text, mask, pooled = join_states(SMALL, states, dtype=torch.bfloat16)
    assert (text.dtype, mask.dtype, pooled.dtype) == (torch.bfloat16, torch.bool, torch.bfloat16)
    low = join_states(SMALL, some_states(dtype=torch.bfloat16))
    assert low.text.dtype == torch.bfloat16
    moved = low.to("meta", torch.float16)
    assert moved.text.device.type == moved.mask.device.type == moved.pooled.device.type == "meta"
    assert (moved.text.dtype, moved.mask.dtype) == (torch.float16, torch.bool)
    assert join_states(TextLayout(0, 0, 12), {}, batch=1).pooled is None


def test_a_layout_goes_through_json():
    layout = TextLayout(4, 0, 12, clip_tokens="prompt", template="a photo of a {}")
    assert TextLayout(**json.loads(json.dumps(layout.to_dict()))) == layout
    assert layout.prompt("{fox}") == "a photo of a {fox}"


# --- Dropping -------------------------------------------------------------------------------------


def test_encoders_are_dropped_independently():
    n = 20000
    kept = draw_kept(SMALL, 3, range(n))
    p = dropout_probability(SMALL)
    assert abs(p - 0.464) < 1e-3  # Stable Diffusion 3's
    dropped = (~kept).double()
    sigma = (p * (1 - p) / n) ** 0.5
    assert (dropped.mean(0) - p).abs().max() < 4 * sigma
    assert abs(dropped.prod(1).mean() - 0.1) < 4 * (0.09 / n) ** 0.5
    correlation = torch.corrcoef(dropped.t()) - torch.eye(3)
    assert correlation.abs().max() < 4 / n**0.5


def test_what_is_dropped_is_a_function_of_seed_and_position():
    whole = draw_kept(SMALL, 3, range(100, 200))
    parts = [draw_kept(SMALL, 3, range(a, a + 20)) for a in range(100, 200, 20)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(draw_kept(SMALL, 3, torch.arange(100, 200)), whole)
    assert not torch.equal(draw_kept(SMALL, 4, range(100, 200)), whole)
    assert not torch.equal(draw_kept(SMALL, 3, range(100)), whole)
    assert draw_kept(SMALL, 3, []).shape == (0, 3)


def test_what_is_dropped_does_not_go_along_with_other_draws():
    """Flips and labels are drawn from the same seed and position."""
    n = 4000
    kept = draw_kept(SMALL, 5, range(n), 0.5).double()
    others = [draw(5, p, n, 0.5) for p in range(n)]
    rows = torch.tensor([[o.flip, o.drop] for o in others]).double()
    correlation = torch.corrcoef(torch.cat((kept, rows), 1).t())[:3, 3:]
    assert correlation.abs().max() < 4 / n**0.5


def test_probabilities_by_name():
    kept = draw_kept(SMALL, 0, range(200), {"clip_g": 1.0, "gemma": 0.5})
    assert kept[:, 0].all()
    assert not kept[:, 1].any()
    assert 60 < kept[:, 2].sum() < 140
    assert draw_kept(CLASS_NAMES, 0, range(2000)).double().mean().sub(0.9).abs() < 0.03


# --- Tables ---------------------------------------------------------------------------------------


def test_a_table_gives_the_states_of_its_labels(tmp_path):
    table = TextTable(SMALL, ["a", "b"], some_states())
    assert (len(table), table.null_class) == (2, 2)
    labels = torch.tensor([1, 2, 0, 1])
    text, mask, pooled = table(labels)
    whole = join_states(SMALL, some_states())
    for row, i in ((0, 1), (2, 0), (3, 1)):
        assert torch.equal(text[row], whole.text[i])
        assert torch.equal(mask[row], whole.mask[i])
        assert torch.equal(pooled[row], whole.pooled[i])
    assert not text[1].any()
    assert not mask[1].any()
    assert not pooled[1].any()
    keep = torch.tensor([[True, False, True]] * 4)
    want = join_states(SMALL, some_states(), keep[:2])
    got = table([1, 2, 0, 1], keep)
    torch.testing.assert_close(attended(got)[[2, 0]], attended(want), atol=1e-6, rtol=1e-5)
    assert not got.mask[1].any()
    assert table(labels, padded=True, dtype=torch.bfloat16).text.shape == (4, 12, 12)


def test_a_saved_table_is_the_same(tmp_path):
    pytest.importorskip("safetensors")
    layout = TextLayout(4, 6, 12, clip_length=5, max_tokens=7, template="a {}")
    states = some_states(layout)
    del states["clip_g"]
    table = TextTable(layout, ["ein Fuchs", "狐"], states)
    table.save(tmp_path / "table.safetensors")
    loaded = TextTable.load(tmp_path / "table.safetensors")
    assert (loaded.layout, loaded.texts) == (layout, table.texts)
    for a, b in zip(loaded([0, 1, 2]), table([0, 1, 2]), strict=True):
        assert torch.equal(a, b)
    table.save(tmp_path / "low.safetensors", torch.bfloat16)
    low = TextTable.load(tmp_path / "low.safetensors")([0, 1])
    assert torch.equal(low.text, table([0, 1]).text.bfloat16())
    for whole in (loaded, TextTable.joined([loaded, table])):
        rows = whole.states["gemma"]
        lengths = [len(row.hidden) for row in rows]
        for part in (slice(0, 1), slice(None, None, -1), slice(1, 9), slice(5, 5)):
            assert [len(row.hidden) for row in rows[part]] == lengths[part]


# --- Learned tokens -------------------------------------------------------------------------------


def test_class_tokens():
    tokens = ClassTokens(3, 2, 12)
    labels = torch.tensor([2, 3, 0])
    text, mask, pooled = tokens(labels)
    assert torch.equal(text[0], tokens.weight[2].view(2, 12))
    assert torch.equal(text[2], tokens.weight[0].view(2, 12))
    assert not text[1].any()
    assert mask.tolist() == [[True] * 2, [False] * 2, [True] * 2]
    assert pooled is None
    layer = attention()
    y = layer(torch.randn(3, 4, 16), text, mask)
    torch.testing.assert_close(y[1], layer.to_out[0].bias.expand(4, 16))
    y.square().sum().backward()
    assert tokens.weight.grad[[0, 2]].abs().sum(1).min() > 0
    assert not tokens.weight.grad[1].any()  # of no label; nor does the null label give a gradient


def test_class_tokens_learn_to_tell_classes_apart():
    torch.manual_seed(0)
    tokens, layer, head = ClassTokens(4, 1, 12), attention(), torch.nn.Linear(16, 5)
    labels = torch.arange(5)  # with the null label
    parameters = [*tokens.parameters(), *layer.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.02)
    for _ in range(150):
        x = torch.randn(5, 1, 16)
        logits = head(layer(x, *tokens(labels)[:2])[:, 0])
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(logits.argmax(1), labels)


def test_class_tokens_compile():
    torch._dynamo.reset()
    tokens, labels = ClassTokens(3, 2, 12), torch.tensor([2, 3, 0])
    got = torch.compile(tokens, fullgraph=True, backend="aot_eager")(labels)
    for a, b in zip(got[:2], tokens(labels)[:2], strict=True):
        assert torch.equal(a, b)


# --- Names ----------------------------------------------------------------------------------------


def test_names_of_classes(tmp_path):
    (tmp_path / "names.txt").write_text("tench\n great white shark \nhen\n", encoding="utf-8")
    names = ("tench", "great white shark", "hen")
    assert read_class_names(tmp_path / "names.txt") == names
    file = tmp_path / "names.json"
    file.write_text(json.dumps(list(names)))
    assert read_class_names(file) == names
    file.write_text(json.dumps({"2": "hen", "0": "tench", "1": "great white shark"}))
    assert read_class_names(file) == names
    assert (DIGITS[0], DIGITS[7], len(DIGITS)) == ("zero", "seven", 10)


def test_classes_of_one_name_are_a_warning(tmp_path):
    (tmp_path / "names.txt").write_text("Crane\nhen\ncrane\n")
    with pytest.warns(UserWarning, match=r"several classes of one name: \['crane'\]"):
        assert read_class_names(tmp_path / "names.txt") == ("Crane", "hen", "crane")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "tench\n\nhen\n", "got none for label 1"),
        ("a.txt", "", "got none for label 0"),
        ("a.json", "{", "expected JSON"),
        ("a.json", "3", "got int"),
        ("a.json", '["a", 3]', "got none for label 1"),
        ("a.json", '{"0": "a", "2": "b"}', 'labels "0" to "1"'),
    ],
)
def test_bad_files_of_names(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"read_class_names: file: .*{message}"):
        read_class_names(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="read_class_names: file: expected"):
        read_class_names(tmp_path / "other.txt")


def test_names_of_imagenet_come_from_timm(monkeypatch):
    class ImageNetInfo:
        def __init__(self, subset):
            assert subset == "imagenet-1k"

        def label_descriptions(self, detailed):
            names = ["crane", "hen", "crane"]
            return [f"{n}: {i}" for i, n in enumerate(names)] if detailed else names

    module = types.SimpleNamespace(ImageNetInfo=ImageNetInfo)
    monkeypatch.setitem(sys.modules, "timm.data", module)
    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(data=module))
    assert imagenet_class_names() == ("crane: 0", "hen", "crane: 2")
    monkeypatch.setitem(sys.modules, "timm.data", None)
    with pytest.raises(ImportError, match="imagenet_class_names: expected timm, or names"):
        imagenet_class_names()


# --- Bad input ------------------------------------------------------------------------------------


def joined(states=None, **options):
    return join_states(SMALL, some_states() if states is None else states, **options)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: TextLayout(-1), "clip_l"),
        (lambda: TextLayout(0, 0, 0), "clip_l"),
        (lambda: TextLayout(clip_tokens="some"), "clip_tokens"),
        (lambda: TextLayout(clip_length=2), "clip_length"),
        (lambda: TextLayout(max_tokens=1.5), "max_tokens"),
        (lambda: TextLayout(template="a photo"), "template"),
        (lambda: dropout_probability(SMALL, 1.1), "unconditional"),
        (lambda: draw_kept(SMALL, -1, [0]), "seed"),
        (lambda: draw_kept(SMALL, 0, [0], 2.0), "probabilities"),
        (lambda: draw_kept(CLASS_NAMES, 0, [0], {"gemma": 0.5}), "probabilities"),
        (lambda: joined({}), "states"),
        (lambda: joined(batch=3), "states"),
        (lambda: joined({"t5": []}), "states"),
        (lambda: joined({"gemma": [TokenStates(torch.ones(2, 4))]}), "states of gemma"),
        (lambda: joined({"gemma": [TokenStates(torch.ones(8, 12))]}), "states of gemma"),
        (lambda: joined(keep=torch.ones(2, 3)), "keep"),
        (lambda: joined(keep=[[True] * 3] * 2), "keep"),
        (lambda: joined(keep=torch.ones(2, 2, dtype=torch.bool)), "keep"),
        (lambda: TextTable(SMALL, [], {}), "texts"),
        (lambda: TextTable(SMALL, ["a"], some_states()), "states of clip_l"),
        (lambda: TextTable(SMALL, ["a", "b"], some_states())([3]), "labels"),
        (lambda: TextTable(SMALL, ["a", "b"], some_states())([-1]), "labels"),
        (lambda: ClassTokens(0, 1, 1), "num_classes"),
        (lambda: ClassTokens(1, 1.0, 1), "tokens"),
        (lambda: ClassTokens(3, 1, 1)(torch.tensor([4])), "labels"),
        (lambda: ClassTokens(3, 1, 1)(torch.tensor([-1])), "labels"),
        (lambda: ClassTokens(3, 1, 1)(torch.tensor([1.0])), "labels"),
        (lambda: ClassTokens(3, 1, 1)(torch.tensor([[1]])), "labels"),
    ],
)  # fmt: skip
def test_bad_calls_are_clear_errors(call, argument):
    with pytest.raises((TypeError, ValueError), match=f": {argument}: expected .*, got "):
        call()


def test_files_that_are_no_tables(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(FileNotFoundError, match=r"TextTable.load: file: expected a table, got"):
        TextTable.load(tmp_path / "none.safetensors")
    safetensors.save_file({"a": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"TextTable.load: file: expected a saved table, got"):
        TextTable.load(tmp_path / "other.safetensors")
