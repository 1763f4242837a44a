"""Models with different tokenizers in one vocabulary: whose row each token has, files, and what is refused."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import polytask as pt
from polytask.core.errors import ConfigError, MergeError
from polytask.merge.embeddings import picked
from polytask.merge.mergekit import merge_file
from polytask.merge.replay import replay
from polytask.merge.source import Checkpoint, Source
from polytask.merge.vocabulary import align

WORDS = {
    "root": ["<unk>", "<s>", "</s>", "sun", "moon", "star", "sea", "hill"],
    "north": ["<unk>", "<s>", "</s>", "moon", "sun", "snow", "sea", "star", "ice", "wind"],  # another order, and more
    "south": ["<unk>", "<s>", "</s>", "sun", "star", "hill", "moon", "sea", "sand", "wind"],
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def tokenizer_of(words):
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def llama(folder, words, seed, rows=None, tied=False, **more):
    config = transformers.LlamaConfig(
        vocab_size=rows or len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied, **more,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = transformers.LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    module.save_pretrained(folder)
    tokenizer_of(words).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("words")
    for seed, (name, words) in enumerate(WORDS.items()):
        llama(place / name, words, seed)
    return place


@pytest.fixture
def place(saved, monkeypatch):
    monkeypatch.chdir(saved)
    return saved


def tensors(folder):
    source = Checkpoint(folder)
    return {name: source.read(name) for name in source.shapes}


def row(name, token, tensor=EMBED):
    return tensors(name)[tensor][WORDS[name].index(token)]


def ids_of(folder):
    return transformers.AutoTokenizer.from_pretrained(folder).get_vocab()


# Whose row each token has


def test_a_union_keeps_the_base_s_ids_and_appends_the_others_in_their_order(place, tmp_path):
    out = pt.merge(["north", "south"], "task_arithmetic", "root", [0.5, 0.5], out=tmp_path / "out", tokenizer="union")
    ids = ids_of(out)
    wanted = [*WORDS["root"], "snow", "ice", "wind", "sand"]
    assert ids == {word: i for i, word in enumerate(wanted)}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 12
    found = tensors(out)
    for name in (EMBED, HEAD):
        assert found[name].shape == (12, 16)
        for token in ("sun", "moon", "sea", "</s>"):  # all have it: each its own, wherever it stands
            mean = (row("north", token, name) + row("south", token, name)) / 2
            assert torch.allclose(found[name][ids[token]], mean, atol=1e-6), token
        # one alone has it: all have that row, the base too
        assert torch.allclose(found[name][ids["snow"]], row("north", "snow", name), atol=1e-6)
        assert torch.allclose(found[name][ids["sand"]], row("south", "sand", name), atol=1e-6)
        # the base has it and one of the models: the other has the base's
        hill = (row("root", "hill", name) + row("south", "hill", name)) / 2
        assert torch.allclose(found[name][ids["hill"]], hill, atol=1e-6)
        # two have it, and not the base: the base has their mean, so the change is none
        wind = (row("north", "wind", name) + row("south", "wind", name)) / 2
        assert torch.allclose(found[name][ids["wind"]], wind, atol=1e-6)
    norm = "model.norm.weight"
    assert torch.allclose(found[norm], (tensors("north")[norm] + tensors("south")[norm]) / 2, atol=1e-6)


def test_one_model_keeps_its_own_logits_in_the_union(place, tmp_path):
    """Token for token, whichever model's layers are taken and in whatever order the rows now stand."""
    out = pt.merge(["root", "north"], "linear", weights=[0, 1], out=tmp_path / "out", tokenizer="union")
    models = [transformers.AutoModelForCausalLM.from_pretrained(f).eval() for f in ("north", out)]
    texts = ["<s> snow moon wind ice", "<s> sun star sea snow"]
    logits = []
    for folder, model in zip(("north", out), models, strict=True):
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = [[tokenizer.convert_tokens_to_ids(word) for word in text.split()] for text in texts]
        assert [tokenizer(t, add_special_tokens=False).input_ids for t in texts] == tokens
        order = [tokenizer.convert_tokens_to_ids(word) for word in WORDS["north"]]
        with torch.no_grad():
            logits.append(model(torch.tensor(tokens)).logits[..., order])
    assert torch.allclose(*logits, atol=1e-5)


def test_the_base_s_vocabulary_leaves_the_others_tokens_out(place, tmp_path):
    out = pt.merge(["north", "south"], "linear", base="root", out=tmp_path / "out", tokenizer="base")
    found = tensors(out)
    assert ids_of(out) == {word: i for i, word in enumerate(WORDS["root"])} and found[EMBED].shape == (8, 16)
    assert torch.allclose(found[EMBED][3], (row("north", "sun") + row("south", "sun")) / 2, atol=1e-6)
    hill = (row("root", "hill") + row("south", "hill")) / 2  # the north lacks it
    assert torch.allclose(found[EMBED][7], hill, atol=1e-6)


def test_a_model_s_own_vocabulary_brings_its_special_tokens(place, tmp_path):
    words = ["</s>", "sun", "<s>", "moon", "<unk>"]
    llama(tmp_path / "east", words, 7)
    out = pt.merge(
        ["root", tmp_path / "east"], "linear", weights=[1, 0], out=tmp_path / "out",
        tokenizer={"source": str(tmp_path / "east")},
    )  # fmt: skip
    config = json.loads((out / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"], config["eos_token_id"]) == (5, 2, 0)
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    assert torch.equal(tensors(out)[EMBED], torch.stack([row("root", word) for word in words]))


def test_tokens_are_said_one_by_one(place, tmp_path):
    tokens = {
        "snow": {"source": "south/../north"},  # what has another name is not known
        "wind": {"source": "south"},
    }
    with pytest.raises(ConfigError, match="there is no model 'south/../north'"):
        pt.merge(["root", "north", "south"], out=tmp_path / "no", tokenizer={"tokens": tokens})
    tokens = {
        "wind": {"source": "south"},
        "sun": {"source": "north", "force": True},
        "sea": {"source": {"kind": "model_token", "model": "north", "token": "ice"}, "force": True},
        "star": {"source": {"kind": "model_token", "model": "south", "token_id": 8}, "force": True},
        "ice": {"source": {"kind": "zero"}},
        "dune": {"source": {"kind": "model_token", "model": "south", "token": "sand"}},
    }
    said = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    made = {}
    for i, name in enumerate(("root", "north", "south")):
        weights = [float(i == j) for j in range(3)]
        out = pt.merge(["root", "north", "south"], weights=weights, out=tmp_path / name, tokenizer=said)
        made[name] = tensors(out)[EMBED]
    ids = ids_of(out)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 16 and len(ids) == 13
    for name, found in made.items():
        assert torch.equal(found[ids["wind"]], row("north" if name == "north" else "south", "wind"))
        assert torch.equal(found[ids["sun"]], row("north", "sun"))
        assert torch.equal(found[ids["sea"]], row("north", "ice"))
        assert torch.equal(found[ids["star"]], row("south", "sand"))
        assert torch.equal(found[ids["dune"]], row("south", "sand"))
        ice = row("north", "ice")
        assert torch.equal(found[ids["ice"]], ice if name == "north" else torch.zeros_like(ice))
        assert torch.allclose(found[13:], found[:13].mean(0).expand(3, -1), atol=1e-6)
    card = json.loads((out / "polytask_merge.json").read_text())["tokenizer"]
    assert card["rows"] == 16 and card["source"] == "union" and set(card["tokens"]) == set(tokens)


def test_a_token_that_nobody_has_is_zero_and_said(place, tmp_path):
    said = {"source": "base", "tokens": {"dune": {}}}
    with pytest.warns(UserWarning, match="no model has the token 'dune'; its rows are zeros"):
        out = pt.merge(["root", "north"], out=tmp_path / "out", tokenizer=said)
    assert torch.equal(tensors(out)[EMBED][ids_of(out)["dune"]], torch.zeros(16))


def test_embeddings_with_more_rows_than_tokens_and_a_tied_head(place, tmp_path):
    llama(tmp_path / "a", WORDS["root"], 1, rows=16, tied=True)
    llama(tmp_path / "b", WORDS["north"], 2, rows=12, tied=True)
    out = pt.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "out", tokenizer="union")
    module = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert HEAD not in tensors(out) and module.get_input_embeddings().weight.shape == (11, 16)
    assert module.lm_head.weight.data_ptr() == module.model.embed_tokens.weight.data_ptr()
    wanted = (tensors(tmp_path / "a")[EMBED][4] + tensors(tmp_path / "b")[EMBED][3]) / 2
    assert torch.allclose(module.lm_head.weight[4], wanted, atol=1e-6)  # moon


def test_the_same_tokenizers_leave_everything_as_it_is(place, tmp_path):
    shutil.copytree("root", tmp_path / "copy")
    plain = pt.merge(["root", tmp_path / "copy"], out=tmp_path / "plain")
    union = pt.merge(["root", tmp_path / "copy"], out=tmp_path / "union", tokenizer="union")
    assert (plain / "model.safetensors").read_bytes() == (union / "model.safetensors").read_bytes()
    assert (plain / "tokenizer.json").read_bytes() == (union / "tokenizer.json").read_bytes()
    # a tuned model that was saved without its tokenizer has the base's
    (tmp_path / "copy" / "tokenizer.json").unlink()
    with pytest.warns(UserWarning, match="has no tokenizer; it is taken to have that of root"):
        again = pt.merge(["root", tmp_path / "copy"], out=tmp_path / "again", tokenizer="union")
    assert (plain / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_an_adapter_among_models_is_moved_with_its_base(place, tmp_path):
    model = pt.Model(transformers.AutoModelForCausalLM.from_pretrained("root"))
    adapter = pt.Adapter.new(model, "lora", seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.05
    adapter.save(tmp_path / "a")
    wanted = adapter.merge_into(model).module.state_dict()
    out = pt.merge([tmp_path / "a", "north"], "linear", "root", [1, 0], out=tmp_path / "out", tokenizer="union")
    found = tensors(out)
    assert torch.allclose(found[EMBED][:8], wanted[EMBED], atol=1e-6)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(found[name], wanted[name], atol=1e-6)


def test_another_vocabulary_does_not_go_on_with_an_interrupted_merge(place, tmp_path, monkeypatch):
    from polytask.merge.write import Writer

    with monkeypatch.context() as stopped:
        stopped.setattr(Writer, "finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pt.merge(["root", "north"], out=tmp_path / "out", tokenizer="union")
    with pytest.raises(MergeError, match="of other models or settings"):
        said = {"tokens": {"ice": {"source": {"kind": "zero"}, "force": True}}}
        pt.merge(["root", "north"], out=tmp_path / "out", tokenizer=said, resume=True)
    pt.merge(["root", "north"], out=tmp_path / "out", tokenizer="union", resume=True)
    whole = pt.merge(["root", "north"], out=tmp_path / "whole", tokenizer="union")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_merge_of_vocabularies_is_done_again_from_its_record(place, tmp_path):
    said = {"source": "union", "tokens": {"sun": {"source": "north", "force": True}}, "pad_to_multiple_of": 8}
    for name, tokenizer in (("plain", "union"), ("more", said)):
        out = pt.merge(["north", "south"], "ties", "root", out=tmp_path / name, tokenizer=tokenizer)
        again = replay(out / "polytask_merge.json", tmp_path / f"{name}-again")
        parents = json.loads((out / "polytask_merge.json").read_text())["parents"]
        assert [entry["path"] for entry in parents] == ["root", "north", "south"]
        assert all(entry["sha256"] for entry in parents)
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert (again / file).read_bytes() == (out / file).read_bytes()


# Rows


class Rows(Source):
    """A matrix whose entries say their place."""

    def __init__(self, name, words, folder, width=3):
        self.name, self.folder, self.words, self.reads = name, folder, words, 0
        self.value = torch.arange(len(words) * width, dtype=torch.float32).view(-1, width) + 1000 * hash_of(name)

    @property
    def shapes(self):
        return {"embed_tokens.weight": tuple(self.value.shape)}

    def dtype(self, name):
        return torch.float32

    def read(self, name, start=0, stop=None):
        self.reads += 1
        return self.value[start:stop]


def hash_of(name):
    return sum(map(ord, name))


@given(rows=st.lists(st.integers(0, 30), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_single_rows_are_picked_in_runs(rows):
    source = Rows("m", list(map(str, range(31))), None)
    assert torch.equal(picked(source, "embed_tokens.weight", torch.tensor(rows)), source.value[torch.tensor(rows)])
    seen = sorted(set(rows))
    assert source.reads == 1 + sum(b - a > 1 for a, b in zip(seen, seen[1:], strict=False))


@given(
    owned=st.lists(st.lists(st.sampled_from("abcdefgh"), unique=True, min_size=1), min_size=1, max_size=4),
    based=st.booleans(), source=st.sampled_from(["union", "base"]), multiple=st.sampled_from([None, 4]),
    start=st.integers(0, 9), stop=st.integers(0, 12),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_vocabularies_give_every_token_the_row_that_the_rules_say(
    owned, based, source, multiple, start, stop, tmp_path_factory
):
    """Against the rules written out again, token by token; and rows read in pieces are those of the whole."""
    place = tmp_path_factory.mktemp("any")
    models = {}
    for i, words in enumerate(owned):
        words = ["<unk>", "<s>", "</s>", *words]
        tokenizer_of(words).save_pretrained(place / str(i))
        models[f"m{i}"] = Rows(f"m{i}", words, place / str(i))
    made, vocabulary = align(
        models, "m0" if based else None, {"source": source, **({"pad_to_multiple_of": multiple} if multiple else {})}
    )
    name = "embed_tokens.weight"
    if vocabulary is None:
        assert made == models
        return
    order = dict.fromkeys(w for m in models.values() for w in m.words) if source == "union" else models["m0"].words
    assert vocabulary.ids == {w: i for i, w in enumerate(order)}
    for key, model in models.items():
        whole = made[key].read(name)
        assert whole.shape == made[key].shapes[name] and torch.equal(
            whole[start:stop], made[key].read(name, start, stop)
        )
        for i, token in enumerate(order):
            owners = [m.value[m.words.index(token)] for m in models.values() if token in m.words]
            if token in model.words:
                wanted = model.value[model.words.index(token)]
            elif based and token in models["m0"].words:
                wanted = owners[0]
            else:
                wanted = torch.stack(owners).mean(0)
            assert torch.allclose(whole[i], wanted), (key, token)
        assert torch.allclose(whole[len(order) :], whole[: len(order)].mean(0).expand(len(whole) - len(order), -1))


# mergekit's files


def test_mergekit_s_tokenizer_source(place, tmp_path):
    text = """
merge_method: task_arithmetic
base_model: root
models:
  - {model: north, parameters: {weight: 0.5}}
  - {model: south, parameters: {weight: 0.5}}
dtype: float32
"""
    ours = pt.merge(["north", "south"], "task_arithmetic", "root", [0.5, 0.5], out=tmp_path / "ours", tokenizer="union")
    out = merge_file(text + "tokenizer_source: union\n", tmp_path / "union")
    assert ids_of(out) == ids_of(ours)
    assert all(torch.equal(value, tensors(ours)[name]) for name, value in tensors(out).items())
    out = merge_file(text + "tokenizer_source: south\n", tmp_path / "south")
    assert ids_of(out) == {word: i for i, word in enumerate(WORDS["south"])}
    said = "tokenizer: {source: base, tokens: {sun: {source: {kind: model_token, model: {model: {path: north}}, token: ice}," \
           " force: true}}, pad_to_multiple_of: 5}\n"  # fmt: skip
    out = merge_file(text + said, tmp_path / "base")
    found = tensors(out)[EMBED]
    assert found.shape == (10, 16) and torch.allclose(found[3], row("north", "ice"), atol=1e-6)
    assert json.loads((out / "polytask_merge.json").read_text())["tokenizer"]["pad_to_multiple_of"] == 5


def test_mergekit_s_slices_of_other_vocabularies(place, tmp_path):
    text = """
merge_method: passthrough
slices:
  - sources: [{model: root, layer_range: [0, 2]}]
  - sources: [{model: north, layer_range: [1, 2]}]
tokenizer_source: union
"""
    out = merge_file(text, tmp_path / "out")
    module = transformers.AutoModelForCausalLM.from_pretrained(out)
    ids = ids_of(out)
    assert module.config.num_hidden_layers == 3 and module.config.vocab_size == len(ids) == 11
    assert torch.equal(module.model.embed_tokens.weight[:8], tensors("root")[EMBED])
    assert torch.equal(module.lm_head.weight[ids["snow"]], row("north", "snow", HEAD))


# The command line


def test_the_command(place, tmp_path, run):
    code, _, err = run("merge", "root", "north", "--tokenizer", "union", "--out", tmp_path / "out")
    assert code == 0, err
    assert len(ids_of(tmp_path / "out")) == 11
    code, _, err = run("merge", "root", "north", "--out", tmp_path / "no")
    assert code == 1 and "say tokenizer='union' or 'base'" in err
    code, _, err = run("merge", "root", "north", "--tokenizer", "onion", "--out", tmp_path / "no")
    assert code == 2 and "there is no model 'onion'" in err


# What is refused


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"sauce": "union"}, "tokenizer has no key 'sauce' .did you mean 'source'"),
        (3, "tokenizer must be 'union', 'base', a model's name, or a mapping, got 3"),
        ("nort", "there is no model 'nort' .did you mean 'north'"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of must be a number from 1, got 0"),
        ({"tokens": ["a"]}, "tokens must be a mapping of tokens"),
        ({"tokens": {"sun": {"from": 1}}}, r"tokens\['sun'\] must be a mapping of source and force"),
        ({"tokens": {"sun": {"force": True}}}, "is forced and has no source"),
        ({"tokens": {"sun": {"source": {"kind": "one"}}}}, "kind must be zero or model_token, got 'one'"),
        ({"tokens": {"sun": {"source": {"kind": "model_token", "model": "root"}}}}, "either token or token_id"),
        ({"tokens": {"ice": {"source": "root"}}}, "root has no token 'ice'"),
        (
            {"tokens": {"ice": {"source": {"kind": "model_token", "model": "root", "token_id": 8}}}},
            "8 rows, and no row 8",
        ),
    ],
)
def test_what_is_not_known_is_refused(place, tmp_path, said, message):
    with pytest.raises(ConfigError, match=message):
        pt.merge(["root", "north"], out=tmp_path / "out", tokenizer=said)
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_brought_together(place, tmp_path):
    llama(tmp_path / "tied", WORDS["north"], 3, tied=True)
    with pytest.raises(MergeError, match="the embeddings differ in names: .*tie both"):
        pt.merge(["root", tmp_path / "tied"], out=tmp_path / "out", tokenizer="union")
    shutil.copytree("north", tmp_path / "bare")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(MergeError, match="bare has no tokenizer; put its files"):
        pt.merge(["root", tmp_path / "bare"], out=tmp_path / "out", tokenizer="union")
    (tmp_path / "bare" / "tokenizer.json").write_text("{}")
    with pytest.raises(MergeError, match="the tokenizer of .*bare cannot be read"):
        pt.merge(["root", tmp_path / "bare"], out=tmp_path / "out", tokenizer="union")
    config = json.loads((tmp_path / "bare" / "config.json").read_text()) | {"vocab_size": 77}
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    with pytest.raises(MergeError, match="has no embeddings of its 77 tokens .*with 10 rows"):
        pt.merge(["root", tmp_path / "bare"], out=tmp_path / "out", tokenizer="union")
    wide = tensors("north")
    wide[EMBED] = wide[EMBED].repeat(1, 2)
    shutil.copytree("north", tmp_path / "wide")
    from safetensors.torch import save_file

    save_file(wide, tmp_path / "wide" / "model.safetensors")
    with pytest.raises(MergeError, match="rows of 32 in .*wide and of 16 in root"):
        pt.merge(["root", tmp_path / "wide"], out=tmp_path / "out", tokenizer="union")
    other = {**tensors("north"), "model.table.weight": torch.zeros(10, 3)}
    save_file(other, tmp_path / "wide" / "model.safetensors")
    with pytest.raises(MergeError, match="model.table.weight of .*wide has as many rows as the vocabulary"):
        pt.merge(["root", tmp_path / "wide"], out=tmp_path / "out", tokenizer="union")
    with pytest.raises(ConfigError, match="tokenizer= is for folders"):
        pt.merge(["root", "north"], tokenizer="union")
    with pytest.raises(ConfigError, match="adapters alone have no embeddings"):
        model = pt.Model(transformers.AutoModelForCausalLM.from_pretrained("root"))
        pt.merge([pt.Adapter.new(model, "lora")], out=tmp_path / "out", tokenizer="union")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pt.merge(["root", "north"], out=tmp_path / "out", tokenizer="union")
