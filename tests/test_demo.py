"""The demo page: recommendations and their reasons are the models' own, and no input breaks or scripts the page.

The product of an item's levels is its probability; nothing of the history is recommended where train says so; only
127.0.0.1 is served. Skipped without Flask (requirements-demo.txt).
"""

import math
import re
import socket
import threading
from types import SimpleNamespace

import pytest
from browser import CHROMIUM, visit

from minionerec import demo
from minionerec.common.errors import UserError

pytest.importorskip("flask")
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def shown(world, checkpoint_folder, tmp_path_factory):
    """(options, the world of a language model and a baseline, a client of its page); item 3 has a hostile title."""
    import sasrec

    folder = tmp_path_factory.mktemp("demo")
    lines = world.info.read_text().splitlines()
    lines[3] = "\t".join([lines[3].split("\t")[0], HOSTILE, "3"])
    (folder / "info.txt").write_text("\n".join(lines) + "\n")
    files = {"train_file": str(world.train), "valid_file": str(world.valid), "test_file": str(world.test)}
    out = str(folder / "markov")
    sasrec.main(sasrec.Options(model="markov", info_file=str(world.info), output_dir=out, **files))
    options = demo.Options(
        models=[str(checkpoint_folder), out], info_file=str(folder / "info.txt"), train_file=str(world.train),
        test_data_path=str(world.test), K=5, num_beams=20,
    )  # fmt: skip
    built = demo.World(options)
    app = demo.build_app(built)
    return SimpleNamespace(options=options, world=built, app=app, client=app.test_client())


def get(shown, address: str) -> str:
    response = shown.client.get(address, base_url="http://127.0.0.1")
    assert response.status_code == 200
    return response.text


@pytest.mark.parametrize("space", ["vocab", "catalog"])
def test_the_levels_explain_the_probability(shown, policy, monkeypatch, space):
    model = shown.world.models["checkpoint"]
    engine, tokenizer = model.recommender.loaded
    monkeypatch.setattr(model.recommender, "loaded", (engine._replace(space=space), tokenizer))
    found = model([*range(20, 40), 9, 10, 11])  # in space catalog the 20 leave the normaliser too
    assert len(found) == 5
    for each in found:
        assert "".join(level.token for level in each.levels) == policy.items.sids[each.item]
        assert math.prod(level.probability for level in each.levels) == pytest.approx(each.probability, rel=1e-3)
    assert sorted(each.probability for each in found)[::-1] == [each.probability for each in found]


def test_a_baseline_gives_shares_and_leaves_out_what_is_known(shown):
    model = shown.world.models["markov"]
    assert model.unseen  # train of this data repeats nothing
    history = [10, 11]
    found = model(history)
    assert not {each.item for each in found} & set(history)
    assert 0 < sum(each.probability for each in found) <= 1 and not found[0].levels


def test_a_history_is_in_the_address(shown):
    text = get(shown, "/?history=9,10,11&q=number+12")
    assert text.count("remove</a>") == 3 and 'href="/?history=9,11"' in text
    assert 'href="/?history=9,10,11,12"' in text
    assert re.findall(r"<h3>([\w ]+)</h3>", text) == ["Titles found", "checkpoint", "markov"]


def test_a_test_row_shows_its_target(shown):
    text = get(shown, "/?row=2")
    target = shown.world.examples["target"][2]
    assert f"({target})</strong>" in text and "Take the history of test row 3" in text
    assert "Take the history of test row 0" in get(shown, "/?row=11")


@pytest.mark.parametrize(
    "address",
    ["/", "/?history=", "/?history=abc,-1,99999999999,1e3", "/?row=x", "/?row=-1", "/?row=%C2%B2", "/?q=%00%FF"],
)
def test_odd_addresses_show_the_empty_page(shown, address):
    assert "Add at least one item" in get(shown, address)


def test_texts_stay_texts(shown):
    for address in ("/?history=3", "/?q=script", f"/?q={HOSTILE}"):
        text = get(shown, address)
        assert "<script" not in text and "&lt;script&gt;" in text
    response = shown.client.get("/", base_url="http://127.0.0.1")
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_other_host_names_are_refused(shown):
    assert shown.client.get("/", base_url="http://evil.example").status_code == 400


def test_what_a_user_can_get_wrong(shown, monkeypatch):
    with pytest.raises(UserError, match="--models is required"):
        demo.main(demo.Options(info_file=shown.options.info_file))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="Address already in use; choose another one"):
            demo.listen(taken.getsockname()[1])
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-demo.txt"):
        demo.main(shown.options)


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium (apt-get install chromium)")
def test_in_a_browser(shown, tmp_path):
    from werkzeug.serving import make_server

    listener = demo.listen(0)
    port = listener.getsockname()[1]
    server = make_server("127.0.0.1", port, shown.app, fd=listener.fileno())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{port}/?history=3,9&q=item"
    seen = visit(address, tmp_path)
    server.shutdown()
    assert seen.console == [] and seen.requests == [address]
    assert seen.dom.count('class="answer"') == 2 and "<meter" in seen.dom and "&lt;script&gt;alert" in seen.dom
