"""The selector language: each construct, precedence, messages, and random expressions against plain Python."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from zoo import tiny

import polytask as pt
from polytask.core.errors import SiteError
from polytask.core.select import describe, parse, select
from polytask.core.site import GROUPS, KINDS, Site

SITES = pt.Model(tiny("bert")[0]).sites
CAUSAL = pt.Model(tiny("mixtral")[0]).sites


def names(selector, sites=SITES):
    return [site.name for site in select(sites, selector)]


def where(test, sites=SITES):
    found = [site.name for site in sites if test(site)]
    assert found, "the expectation itself matches nothing"
    return found


# Each construct


def test_all_is_every_site_in_order():
    assert names("all") == [site.name for site in SITES]


def test_linear_is_what_the_blocks_are_made_of():
    picked = where(lambda s: s.kind == "linear" and s.role != "pooler")
    assert names("linear") == picked and "pooler.dense" not in picked and len(picked) == 12
    assert names("kind:linear") == where(lambda s: s.kind == "linear") == [*picked, "pooler.dense"]
    assert "lm_head" not in names("linear", CAUSAL) and "lm_head" in names("kind:linear", CAUSAL)


@pytest.mark.parametrize("role", ["query", "value", "up", "down", "attn_out", "token", "pooler"])
def test_roles(role):
    assert names(role) == names(f"role:{role}") == where(lambda s: s.role == role)


@pytest.mark.parametrize("kind", ["embedding", "norm", "block"])
def test_kinds(kind):
    assert names(kind) == names(f"kind:{kind}") == where(lambda s: s.kind == kind)


def test_groups_of_roles():
    assert names("mlp") == names("up | down") == where(lambda s: s.role in ("up", "down"))
    assert names("mlp", CAUSAL) == where(lambda s: s.role in ("gate_up", "down"), CAUSAL)
    # a word that is both: the projections, and the module around them
    assert names("attention & kind:linear") == where(lambda s: s.role in GROUPS["attention"])
    assert names("kind:attention") == ["encoder.layer.0.attention.self", "encoder.layer.1.attention.self"]
    assert names("attention") == where(lambda s: s.role in GROUPS["attention"] or s.kind == "attention")


def test_kind_and_role_tell_a_word_apart():
    assert names("kind:embedding") == where(lambda s: s.kind == "embedding")
    assert set(names("role:position")) == {"embeddings.position_embeddings"}
    assert names("role:norm") == names("kind:norm")


@pytest.mark.parametrize("spaces", ["", " ", "  "])
@pytest.mark.parametrize(
    ("sign", "test"),
    [
        (">=", lambda a, b: a >= b),
        ("<=", lambda a, b: a <= b),
        ("==", lambda a, b: a == b),
        ("!=", lambda a, b: a != b),
        (">", lambda a, b: a > b),
        ("<", lambda a, b: a < b),
    ],
)
def test_comparisons(sign, test, spaces):
    sites = pt.Model(tiny("swin")[0]).sites  # four blocks
    for field, bound in (("layer", 1), ("layer", 2), ("depth", 1 / 2), ("depth", 1.0)):
        want = [s.name for s in sites if getattr(s, field) is not None and test(getattr(s, field), bound)]
        expression = f"{field}{spaces}{sign}{spaces}{bound}"
        if want:
            assert names(expression, sites) == want
        else:
            with pytest.raises(SiteError, match="no site matches"):
                names(expression, sites)


def test_a_range_of_layers_has_both_ends():
    sites = pt.Model(tiny("swin")[0]).sites
    want = where(lambda s: s.layer is not None and 1 <= s.layer <= 2, sites)
    assert names("layer in 1..2", sites) == names("layer in 1 .. 2", sites) == want
    assert names("layer in 0..3", sites) == where(lambda s: s.layer is not None, sites)


def test_what_is_outside_of_the_blocks_has_no_depth():
    outside = where(lambda s: s.layer is None)
    assert names("!depth>=0") == names("!(depth>=0)") == outside and "pooler.dense" in outside
    assert not set(names("depth<=1")) & set(outside)


def test_regular_expressions():
    want = where(lambda s: re.search(r"layer\.[01]\..*dense", s.name))
    assert names(r"re:layer\.[01]\..*dense") == want
    assert names(r're:"layer\.[01]\..*dense" & linear') == want
    assert names(r"re:'query|key' & layer==0") == where(lambda s: s.layer == 0 and s.role in ("query", "key"))
    assert names("re:que.y|valu. & layer==0") == where(lambda s: s.layer == 0 and s.role in ("query", "value"))
    assert names("re:^embeddings") == where(lambda s: s.name.startswith("embeddings"))


def test_paths_and_the_ends_of_paths():
    assert names("encoder.layer.0") == where(
        lambda s: s.name == "encoder.layer.0" or s.name.startswith("encoder.layer.0.")
    )
    assert names("pooler.dense") == ["pooler.dense"]
    assert names("output.dense") == where(lambda s: s.name.endswith(".output.dense"))
    assert names("intermediate.dense & layer==1") == ["encoder.layer.1.intermediate.dense"]
    # whole parts of a path only
    with pytest.raises(SiteError):
        names("encoder.lay")
    with pytest.raises(SiteError):
        names("ense")


def test_the_name_of_a_raw_parameter():
    assert names("gate_up_proj", CAUSAL) == where(lambda s: s.param == "gate_up_proj", CAUSAL)
    assert names("model.layers.0.mlp.experts", CAUSAL) == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
    ]


# Joining


def test_not_binds_tighter_than_and_and_that_tighter_than_or():
    assert (
        names("query | value & layer==0")
        == names("query | (value & layer==0)")
        == where(lambda s: s.role == "query" or (s.role == "value" and s.layer == 0))
    )
    assert names("(query | value) & layer==0") == where(lambda s: s.role in ("query", "value") and s.layer == 0)
    assert (
        names("!query & linear")
        == names("(!query) & linear")
        == where(lambda s: s.kind == "linear" and s.role not in ("query", "pooler"))
    )
    assert names("!(query | linear)") == where(lambda s: s.kind != "linear" or s.role == "pooler")
    assert names("!!query") == names("query")
    assert names("linear&!mlp&layer==1|pooler") == where(
        lambda s: s.role == "pooler" or (s.layer == 1 and s.role in ("query", "key", "value", "attn_out"))
    )


def test_several_selectors_are_joined_by_or_and_keep_the_order_of_the_sites():
    assert names(["value", "query & layer==0"]) == names("query & layer==0 | value")
    assert names(("pooler", "token")) == ["embeddings.word_embeddings", "pooler.dense"]


def test_a_function_of_a_site():
    assert names(lambda site: site.shape == (64, 32)) == where(lambda s: s.role == "up")

    def nothing_here(site):
        return False

    with pytest.raises(SiteError, match="no site matches 'nothing_here'"):
        names(nothing_here)


# Messages


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "quary",
            r"no site matches 'quary' \(did you mean 'query'\?\); this model has roles .*query \(2\).*layers 0\.\.1",
        ),
        ("layer==0 & valeu", r"no site matches .* \(did you mean 'value'\?\)"),
        ("layer==9", r"no site matches 'layer==9'; this model has"),
        ("experts", r"no site matches 'experts'.*kinds linear \(13\), norm \(5\), embedding \(3\)"),
        ("kind:linaer", r"no kind is called 'linaer' \(did you mean 'linear'\?\); there are: linear, conv"),
        ("role:quey", r"no role is called 'quey' \(did you mean 'query'\?\); there are: "),
        ("query | !role:quey", "no role is called 'quey'"),
        ("type:norm", r"'type:norm' has an unknown prefix; there are: kind:, role:, re:"),
        ("(query", "'\\(query' lacks a closing parenthesis"),
        ("query)", "goes on after it is complete, at '\\)'"),
        ("query value", "goes on after it is complete, at 'value'; join with & or |"),
        ("query &", "has its end where a name, a comparison or '\\(' is needed"),
        ("", "has its end where"),
        ("   ", "has its end where"),
        ("!", "has its end where"),
        ("| query", r"has '\|' where a name"),
        ("()", r"has '\)' where a name"),
        ("query, value", "cannot be read at ', value'"),
        ("depth>=high", "cannot be read at '>=high'"),
        ("depth>=0.5.1", "'depth>=0.5.1' does not end in a number"),
        ("re:", "'re:' without a regular expression"),
        ('re:""', "'re:' without a regular expression"),
        ("re:[", "the regular expression '\\[' cannot be read: unterminated character set"),
    ],
)
def test_errors_say_what_was_wrong_and_what_there_is(selector, message):
    with pytest.raises(SiteError, match=message):
        names(selector)


def test_no_selector_matches_nothing():
    with pytest.raises(SiteError, match="no site matches ''"):
        names([])


def test_describe_counts_what_there_is():
    text = describe(SITES)
    assert "query (2)" in text and "pooler (1)" in text and "linear (13)" in text and text.endswith("; layers 0..1")
    assert describe([Site("a", "linear", "other", (1, 1))]) == "roles other (1); kinds linear (1)"


# Random expressions: text for the parser beside the same thing in Python

_ATOMS = st.one_of(
    st.sampled_from(["query", "value", "up", "token", "pooler", "attn_out"]).map(
        lambda role: (role, lambda s: s.role == role)
    ),
    st.sampled_from([k for k in KINDS if k != "input"]).map(lambda kind: (f"kind:{kind}", lambda s: s.kind == kind)),
    st.just(("mlp", lambda s: s.role in GROUPS["mlp"])),
    st.just(("all", lambda s: True)),
    st.just(("encoder.layer.1", lambda s: s.name == "encoder.layer.1" or s.name.startswith("encoder.layer.1."))),
    st.just(("re:'dense|norm'", lambda s: re.search("dense|norm", s.name) is not None)),
    st.integers(0, 2).map(lambda n: (f"layer=={n}", lambda s: s.layer == n)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)).map(
        lambda ab: (f"layer in {ab[0]}..{ab[1]}", lambda s: s.layer is not None and ab[0] <= s.layer <= ab[1])
    ),
    st.sampled_from([0.0, 0.5, 1.0]).map(
        lambda bound: (f"depth >= {bound}", lambda s: s.depth is not None and s.depth >= bound)
    ),
)


def _joined(pair):
    """Binary and unary joins, with only the parentheses that the precedence needs: or < and < not."""
    return st.one_of(
        st.tuples(pair, pair).map(
            lambda p: (f"({p[0][0]} | {p[1][0]})", lambda s: p[0][1](s) or p[1][1](s)),
        ),
        st.tuples(pair, pair).map(lambda p: (f"{p[0][0]} & {p[1][0]}", lambda s: p[0][1](s) and p[1][1](s))),
        pair.map(lambda p: (f"!({p[0]})", lambda s: not p[1](s))),
    )


@given(st.recursive(_ATOMS, _joined, max_leaves=8), st.recursive(_ATOMS, _joined, max_leaves=4))
def test_random_expressions_agree_with_python(left, right):
    for text, test in (left, (f"{left[0]} | {right[0]}", lambda s: left[1](s) or right[1](s))):
        parsed = parse(text)
        assert [parsed(site) for site in SITES] == [bool(test(site)) for site in SITES]


@given(st.text("query|&!()re:.01= <>layrdpthkin\"'", max_size=20))
def test_any_text_is_read_or_refused(text):
    try:
        parsed = parse(text)
    except SiteError:
        return
    assert all(isinstance(parsed(site), bool) for site in SITES)
