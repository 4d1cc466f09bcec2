"""RecBole's atomic files: columns by their usual names or by options; a folder with more than one set is refused."""

import json

import pytest
from helpers import run_stage

from minionerec.common.errors import UserError
from preprocess.recbole import Options, main

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n" + "".join(
    f"{user}\t{item}\t{rating}\t{time}\n"
    for user, item, rating, time in [("u", "b", 5, 2.5), ("u", "a", 1, 1), ("u", "c", 4, 2.25), ("v", "a", 3, 1)]
)
ITEM = "item_id:token\ttitle:token_seq\tcategories:token_seq\tbrand:token\na\tA a\tX Y\tQ\nb\tB\t\t\nc\tC\tX\t\n"


def write(folder, inter=INTER, item=ITEM, **changes):
    (folder / "shop.inter").write_text(inter)
    if item:
        (folder / "shop.item").write_text(item)
    return Options(input_dir=str(folder), output_dir=str(folder / "out"), **changes)


def items(folder) -> list[dict]:
    return list(json.loads((folder / "out" / "shop.item.json").read_text()).values())


def test_by_hand(tmp_path):
    main(write(tmp_path))
    assert (tmp_path / "out" / "shop.test.inter").read_text().splitlines()[1:] == ["0\t0 2\t1"]  # fractions of seconds
    assert items(tmp_path)[0] == {"title": "A a", "description": "", "brand": "Q", "categories": "X, Y"}


def test_without_items_or_times(tmp_path):
    main(write(tmp_path, item="", time_column="none"))
    assert (tmp_path / "out" / "shop.test.inter").read_text().splitlines()[1:] == ["0\t1 0\t2"]
    assert [item["title"] for item in items(tmp_path)] == ["a", "b", "c"]


def test_named_columns_and_ratings(tmp_path):
    options = write(
        tmp_path, INTER.replace("user_id", "who"), ITEM.replace("title", "label"), user_column="who",
        title_column="label", min_rating=3, untitled="keep",
    )  # fmt: skip
    with pytest.raises(UserError, match="none of 2 users has 3"):
        main(options)  # of four ratings, one is too low
    assert not (tmp_path / "out" / "shop.item.json").exists()


@pytest.mark.parametrize(
    "changes, found",
    [
        ({"user_column": "who"}, "shop.inter: no column 'who', found ['user_id', 'item_id', 'rating', 'timestamp']"),
        ({"item": "item_id:token\tx:token\na\tb\n"}, "shop.item: no column of titles"),
        ({"item": ITEM + "a\tA\t\t\n"}, "row 5, column item_id: found 'a', expected each item once"),
        ({"item": ITEM.replace("c\tC", "d\tC")}, "1 interactions are of items without a title, the first of item c"),
        (
            {"inter": INTER.replace("rating:float", "user_id:float")},
            "shop.inter: found the columns ['user_id:token', 'user_id:float'], expected names",
        ),
        (
            {"item": ITEM.replace("brand:token", "title:token")},
            "shop.item: found the columns ['title:token_seq', 'title:token']",
        ),
        ({"inter": INTER + "u\ta\t5\n"}, "row 6, column timestamp: found ''"),
        ({"inter": INTER + "u\ta\t5\t1\t1\n"}, "row 6: found 5 cells, expected 4"),
    ],
)
def test_bad_sources(tmp_path, changes, found):
    with pytest.raises(UserError) as refused:
        main(write(tmp_path, **changes))
    assert found in str(refused.value) and not list((tmp_path / "out").glob("*.inter"))


@pytest.mark.parametrize("changes", [{"title_column": "title"}, {"untitled": "drop"}])
def test_options_of_an_item_file_need_one(tmp_path, changes):
    with pytest.raises(UserError, match="there are no item texts; leave it out, or give a folder with <D>.item"):
        main(write(tmp_path, item="", **changes))
    assert not (tmp_path / "out").exists()


def test_two_sets_in_a_folder(tmp_path):
    (tmp_path / "other.inter").write_text(INTER)
    with pytest.raises(UserError, match="found 2 files \\*.inter, expected one"):
        main(write(tmp_path))
    main(write(tmp_path, dataset_name="shop"))
    assert (tmp_path / "out" / "shop.item.json").exists()


def test_the_source_folder_may_be_the_output_folder(tmp_path, capsys):
    options = write(tmp_path)
    options.output_dir = str(tmp_path)
    main(options)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    main(options)
    assert "complete with these options, nothing to do" in capsys.readouterr().out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == written
    record = json.loads(written["shop.preprocess.run.json"]) | {"complete": False}
    (tmp_path / "shop.preprocess.run.json").write_text(json.dumps(record))  # as of a killed run
    (tmp_path / "shop.test.inter").unlink()
    main(options)
    assert (tmp_path / "shop.test.inter").read_bytes() == written["shop.test.inter"]


def test_a_source_is_never_written_over(tmp_path):
    (tmp_path / "shop.train.inter").write_text(INTER)
    options = Options(input_dir=str(tmp_path), output_dir=str(tmp_path), overwrite=True)
    with pytest.raises(UserError, match="shop.train.inter: would be read and written; give another --output_dir"):
        main(options)
    assert [path.name for path in tmp_path.iterdir()] == ["shop.train.inter"]


def test_the_command(tmp_path):
    write(tmp_path)
    done = run_stage("preprocess.recbole", "--input_dir", tmp_path, "--output_dir", tmp_path / "out")
    assert "read: 2 users, 3 items, 4 interactions" in done.stdout
