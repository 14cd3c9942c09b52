"""The presets: sizes, causality, the notebook's logits, and agreement with Qwen3."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tinylm import notebook
from tinylm.config import PRESETS, ModelConfig, TrainConfig
from tinylm.errors import InputError
from tinylm.export import qwen3_config, qwen3_tensors
from tinylm.kernels import document_starts
from tinylm.model import KVCache, Transformer


def small_model(preset: str, **options: object) -> Transformer:
    config = replace(TrainConfig.from_preset(preset).model, vocab_size=50, **options)
    model = Transformer(config, seed=1)
    with torch.no_grad():  # projections start at zero; give every path something to carry
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model.eval()


def random_ids(batch: int, length: int, vocab_size: int = 50) -> Tensor:
    return torch.randint(0, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("preset", "count"), [("notebook", 2_702_480), ("causal", 2_706_576), ("modern", 2_133_632)]
)
def test_parameter_counts(preset: str, count: int) -> None:
    config = TrainConfig.from_preset(preset).model
    assert Transformer(config).parameter_count() == count


@pytest.mark.parametrize("preset", PRESETS)
def test_the_future_never_changes_an_earlier_logit_but_in_the_notebook(preset: str) -> None:
    model, ids = small_model(preset), random_ids(2, 20)
    logits = model(ids)
    for t in range(1, 20):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 50
        after = model(changed)
        same = torch.equal(after[:, :t], logits[:, :t])
        assert same == (preset != "notebook"), f"token {t}"
        assert not torch.equal(after[:, t:], logits[:, t:])


@pytest.mark.parametrize("preset", ["causal", "modern"])
def test_no_gradient_flows_to_later_inputs(preset: str) -> None:
    model = small_model(preset)
    embedded: list[Tensor] = []
    model.embedding.register_forward_hook(
        lambda *args: embedded.append(args[2]) or args[2].requires_grad_()
    )
    logits = model(random_ids(1, 10))
    for t in range(10):
        (grad,) = torch.autograd.grad(logits[:, t].sum(), embedded[0], retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, : t + 1].abs().sum(-1) > 0).all()


@pytest.mark.parametrize("preset", ["causal", "modern"])
@pytest.mark.parametrize("pieces", [[1] * 20, [7, 1, 12], [20]])
def test_cached_and_uncached_logits_agree(preset: str, pieces: list[int]) -> None:
    model, ids = small_model(preset), random_ids(3, 20)
    cache = KVCache.empty(model.config, 3, model.embedding.weight)
    with torch.no_grad():
        whole = model(ids)
        parts = [model.logits(model.hidden(part, cache)) for part in ids.split(pieces, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["notebook", "causal", "modern"])
def test_left_padding_changes_nothing(preset: str) -> None:
    model, ids = small_model(preset), random_ids(1, 12)
    padded = torch.cat((torch.zeros(1, 5, dtype=torch.long), ids), dim=1)
    with torch.no_grad():
        plain = model(ids)
        out = model.logits(model.hidden(padded, start_BT=torch.tensor([[5]])))[:, 5:]
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", ["causal", "modern"])
def test_packed_documents_are_as_if_alone(preset: str) -> None:
    """With learned positions, which begin again in each document, and with rotary ones."""
    model, ids = small_model(preset), random_ids(1, 12)
    ids[ids == 0] = 1
    ids[0, 4] = 0  # the end of the first
    start_BT = document_starts(ids, end_id=0)
    out = model.logits(model.hidden(ids, start_BT=start_BT))
    alone = torch.cat((model(ids[:, :5]), model(ids[:, 5:])), dim=1)
    torch.testing.assert_close(out, alone, rtol=1e-5, atol=1e-5)
    targets = ids.roll(-1, dims=1)
    loss = model.loss(ids, targets, start_BT=start_BT, z_loss=0.1)
    expected = nn.functional.cross_entropy(alone[0], targets[0])
    penalty = 0.1 * alone.logsumexp(-1).square().mean()
    torch.testing.assert_close(loss, expected + penalty)


def test_too_long_a_context_is_named() -> None:
    with pytest.raises(InputError, match="33 positions are more than the model's max_seq_len 32"):
        small_model("causal")(random_ids(1, 33))


def test_weights_depend_on_the_seed_alone() -> None:
    config = ModelConfig(vocab_size=50)
    torch.manual_seed(1)
    a, b, c = Transformer(config, 1), Transformer(config, 1), Transformer(config, 2)
    assert torch.equal(a.embedding.weight, b.embedding.weight)
    assert not torch.equal(a.embedding.weight, c.embedding.weight)


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, ids = small_model("modern"), random_ids(2, 12)
    targets = ids.roll(-1, dims=1)
    targets[0, 3] = -100
    expected = nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model.loss(ids, targets), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 130, "n_heads": 4}, "d_model 130 is not divisible by n_heads 4"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads 4 is not divisible by n_kv_heads 3"),
        ({"d_model": 12, "n_heads": 4}, "head dimension 3"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"activation": "gelu"}, "unknown activation 'gelu'"),
    ],
)
def test_sizes_that_cannot_work_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**options)  # type: ignore[arg-type]


# --- the notebook's model, written plainly -------------------------------------------------------


class NotebookModel(nn.Module):
    """The notebook's description, word for word in torch's own modules."""

    def __init__(self, vocab_size: int, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.feedforward = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )
        self.output = nn.Linear(width, vocab_size)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        x = self.norm2(x + self.feedforward(x))
        out: Tensor = self.output(x)
        return out


def test_notebook_weights_give_the_notebook_logits(tmp_path: Path) -> None:
    torch.manual_seed(3)
    theirs = NotebookModel(10_000, 128, 4, 256)
    torch.save(theirs.state_dict(), tmp_path / "simple_transformer.pth")
    ours = notebook.load_state_dict(tmp_path / "simple_transformer.pth")
    assert ours.parameter_count() == 2_702_480
    ids = random_ids(4, 32, 10_000)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids), rtol=1e-4, atol=1e-5)


def test_notebook_weights_survive_a_round_trip(tmp_path: Path) -> None:
    model = small_model("notebook")
    notebook.save_state_dict(model, tmp_path / "out.pth")
    theirs = NotebookModel(50, 128, 4, 256)
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    again = notebook.load_state_dict(tmp_path / "out.pth")
    ids = random_ids(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids), model(ids), rtol=1e-4, atol=1e-5)
        assert torch.equal(again(ids), model(ids))


class Evil:
    """Runs code when unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('unpickled')",))


def test_notebook_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"embedding.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="not a file of plain tensors"):
        notebook.load_state_dict(tmp_path / "evil.pth")


def test_other_state_dicts_are_refused(tmp_path: Path) -> None:
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match=r"not the notebook's model: missing .*layer\.weight"):
        notebook.load_state_dict(tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(InputError, match="not a file of plain tensors"):
        notebook.load_state_dict(tmp_path / "text.pth")
    with pytest.raises(InputError, match="no such file"):
        notebook.load_state_dict(tmp_path / "none.pth")
    with pytest.raises(InputError, match="only a model of the notebook preset"):
        notebook.save_state_dict(small_model("modern"), tmp_path / "out.pth")


# --- modern is Qwen3 -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"n_kv_heads": 2}, {"tie_embeddings": False}])
def test_modern_is_qwen3(options: dict[str, object]) -> None:
    transformers = pytest.importorskip("transformers")
    model = small_model("modern", **options)
    config = transformers.Qwen3Config(**qwen3_config(model.config, eos_id=0))
    theirs = transformers.Qwen3ForCausalLM(config).eval()
    missing, extra = theirs.load_state_dict(
        qwen3_tensors(model.config, model.state_dict()), strict=False
    )
    assert not extra
    assert set(missing) <= {"lm_head.weight"}
    ids = random_ids(2, 40)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=1e-4, atol=1e-4)
