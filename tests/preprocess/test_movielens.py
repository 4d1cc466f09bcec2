"""MovieLens-100K.

Invariants: order by time, ties in file order, leave-one-out; films that nobody rated are left out, users with fewer than 3
ratings have no sample; every layout gives the same files; what is wrong with a source is one line, and nothing is written.
"""

import importlib.util
import json

import pytest
from helpers import run_stage

from minionerec.common.errors import UserError
from preprocess.movielens import Options, main

RATINGS = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
FILMS = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
ROWS = [(1, 10, 5), (1, 30, 1), (2, 10, 1), (1, 20, 5), (2, 20, 2), (2, 30, 3), (1, 40, 9), (3, 10, 1)]


def write(folder, ratings=None, films=None):
    good = RATINGS + "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in ROWS)
    (folder / "ml-100k.inter").write_bytes(good.encode() if ratings is None else ratings)
    good = FILMS + "".join(f"{i}\tFilm {i}\t199{i // 10}\tDrama War\n" for i in (10, 20, 30, 40, 50))
    (folder / "ml-100k.item").write_bytes(good.encode() if films is None else films)
    return Options(output_dir=str(folder / "out"), input_dir=str(folder), max_history=2)


def test_by_hand(tmp_path):
    options = write(tmp_path)
    main(options)
    inter = {
        split: sorted((tmp_path / "out" / f"ml-100k.{split}.inter").read_text().splitlines()[1:])
        for split in ("train", "valid", "test")
    }
    # user 1: 30, 10, 20, 40 by time; user 2: 10, 20, 30; user 3 has one rating; ids are 0..3 for films 10..40 and 0..2 for the users
    assert inter == {"train": ["0\t2\t0"], "valid": ["0\t2 0\t1", "1\t0\t1"], "test": ["0\t2 0 1\t3", "1\t0 1\t2"]}
    items = json.loads((tmp_path / "out" / "ml-100k.item.json").read_text())
    assert len(items) == 4 and items["0"]["title"] == "Film 10 (1991)" and items["0"]["categories"] == "Drama, War"


def test_a_finished_run_is_skipped(tmp_path, capsys):
    main(write(tmp_path))
    before = (tmp_path / "out" / "ml-100k.item.json").stat().st_mtime_ns
    capsys.readouterr()
    main(write(tmp_path))
    assert "nothing to do" in capsys.readouterr().out
    assert (tmp_path / "out" / "ml-100k.item.json").stat().st_mtime_ns == before


def test_films_without_year_or_class(tmp_path):
    films = FILMS + "".join(f"{i}\tFilm {i}\t\t\n" for i in (10, 20, 30, 40))
    main(write(tmp_path, films=films.encode()))
    items = json.loads((tmp_path / "out" / "ml-100k.item.json").read_text())
    assert items["3"] == {"title": "Film 40", "description": "", "brand": "", "categories": ""}


# ------------------------------------------------------------------------------------------------ releases

TITLES = {10: 'Amélie: the "film", 2nd (2001)', 20: "Plain (1999)", 30: "Se7en (1995)", 40: "|Bars (1990)", 50: "X"}
GENRES = {10: "Comedy|Romance", 20: "Drama", 30: "(no genres listed)", 40: "Drama|War", 50: "War"}


def write_100k(folder):
    names = ["unknown", "Comedy", "Drama", "Romance", "War"]
    (folder / "u.genre").write_text("".join(f"{name}|{i}\n" for i, name in enumerate(names)) + "\n")
    (folder / "u.data").write_text("".join(f"{user}\t{film}\t4\t{time}\n" for user, film, time in ROWS))
    lines = []
    for film, title in TITLES.items():
        flags = [str(int(name in GENRES[film].split("|"))) for name in names]
        lines.append("|".join([str(film), title.replace("|", "/"), "01-Jan-1995", "", "http://x", *flags]))
    (folder / "u.item").write_bytes("\n".join(lines).encode("latin-1"))


def write_dat(folder, encoding):
    (folder / "ratings.dat").write_text("".join(f"{user}::{film}::4::{time}\n" for user, film, time in ROWS))
    lines = [f"{film}::{title.replace('|', '/')}::{GENRES[film]}\n" for film, title in TITLES.items()]
    (folder / "movies.dat").write_bytes("".join(lines).encode(encoding))


def write_csv(folder):
    rows = "".join(f"{user},{film},4.0,{time}\n" for user, film, time in ROWS)
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + rows)
    lines = [
        f'{film},"{title.replace("|", "/").replace(chr(34), chr(34) * 2)}",{GENRES[film]}\n'
        for film, title in TITLES.items()
    ]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(lines), encoding="utf-8")


LAYOUTS = {
    "100K": write_100k,
    "1M": lambda folder: write_dat(folder, "latin-1"),
    "10M": lambda folder: write_dat(folder, "utf-8"),
    "32M": write_csv,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(tmp_path, layout):
    folder = tmp_path / "ml-x"
    folder.mkdir()
    LAYOUTS[layout](folder)
    main(Options(output_dir=str(tmp_path / "out"), input_dir=str(folder)))
    assert (tmp_path / "out" / "ml-x.test.inter").read_text().splitlines()[1:] == ["1\t0 1\t2", "0\t2 0 1\t3"]
    items = list(json.loads((tmp_path / "out" / "ml-x.item.json").read_text()).values())
    assert [item["title"] for item in items] == [
        'Amélie: the "film", 2nd (2001)', "Plain (1999)", "Se7en (1995)", "/Bars (1990)",
    ]  # fmt: skip
    assert [item["categories"] for item in items] == ["Comedy, Romance", "Drama", "", "Drama, War"]
    main(Options(output_dir=str(tmp_path / "high"), input_dir=str(folder), min_rating=4, dataset_name="high"))
    assert (tmp_path / "high" / "high.item.json").exists()


@pytest.mark.parametrize(
    "layout, file, line, found",
    [
        ("100K", "u.data", "9\t10\tx\t5\n", "u.data, row 9, column rating: found 'x', expected a number"),
        ("100K", "u.item", "\n60|A|B\n", "u.item, line 6: found 3 cells, expected 10"),
        ("100K", "u.data", "9\t60\t4\t5\n", "1 interactions are of items without a title, the first of item 60"),
        (
            "1M",
            "ratings.dat",
            "9::10::4::-3\n",
            "ratings.dat, row 9, column time: found '-3', expected a time stamp in s",
        ),
        ("1M", "ratings.dat", "9::10::4::5::6\n", "ratings.dat, row 9: found 9 cells, expected 7"),
        ("1M", "movies.dat", "60:A:B\n", "movies.dat, line 6: found '60:A:B', expected film::title::genres"),
        ("1M", "movies.dat", "10::A::War\n", "movies.dat: film 10 is there twice"),
        ("32M", "movies.csv", "10,A,War\n", "movies.csv: film 10 is there twice"),
        ("32M", "movies.csv", "60,A\n", "movies.csv, row 7: found 2 cells, expected 3"),
        ("32M", "ratings.csv", "9,10,4.0\n", "ratings.csv, row 10, column timestamp: found ''"),
    ],
)
def test_broken_releases(tmp_path, layout, file, line, found):
    LAYOUTS[layout](tmp_path)
    with open(tmp_path / file, "a") as f:
        f.write(line)
    with pytest.raises(UserError) as refused:
        main(Options(output_dir=str(tmp_path / "out"), input_dir=str(tmp_path)))
    assert found in str(refused.value)


def test_a_release_without_films(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(UserError, match="movies.csv: no such file"):
        main(Options(output_dir=str(tmp_path / "out"), input_dir=str(tmp_path)))


@pytest.mark.skipif(not importlib.util.find_spec("recbole"), reason="needs the recbole wheel")
def test_the_wheel_has_the_published_statistics(tmp_path):
    main(Options(output_dir=str(tmp_path)))
    stats = json.loads((tmp_path / "ml-100k.stats.json").read_text())
    assert (stats["users"], stats["items"], stats["interactions"]) == (943, 1_682, 100_000)
    assert stats["split"]["samples"] == {"train": 97_171, "valid": 943, "test": 943}


# ------------------------------------------------------------------------------------------------ what is wrong


def rating(line: str) -> dict:
    return {"ratings": (RATINGS + "1\t10\t5\t1\n" + line).encode()}


def film(line: str) -> dict:
    return {"films": (FILMS + "10\tFilm\t1991\tDrama\n" + line).encode()}


BAD = {
    "no ratings": ({"ratings": RATINGS.encode()}, "read: no interaction is left"),
    "an empty file": ({"ratings": b""}, "ml-100k.inter: the file is empty"),
    "no time column": ({"ratings": b"user_id:token\titem_id:token\n1\t10\n"}, "no column 'timestamp', found"),
    "no item column": ({"films": b"movie_id:token\tmovie_title:token_seq\n1\tx\n"}, "no column 'item_id', found"),
    "no title column": (
        {"films": b"item_id:token\tclass:token_seq\n1\tx\n"},
        "no column of titles, found ['item_id', ",
    ),
    "a time that is none": (rating("1\t20\t5\tnoon\n"), "row 3, column timestamp: found 'noon'"),
    "an endless time": (rating("1\t20\t5\tinf\n"), "row 3, column timestamp: found 'inf'"),
    "no time": (rating("1\t20\t5\t\n"), "row 3, column timestamp: found ''"),
    "no user": (rating("\t20\t5\t1\n"), "row 3, column user_id: found '', expected an id"),
    "a row too short": (rating("1\t20\n"), "row 3, column timestamp: found ''"),
    "latin-1": ({"films": FILMS.encode() + "10\tCité\t\t\n".encode("latin-1")}, "line 2: found the byte 0xe9"),
    "an item twice": (film("20\tA\t\t\n10\tB\t\t\n"), "row 4, column item_id: found '10', expected each item once"),
    "unknown items": (film("20\tA\t\t\n"), "3 interactions are of items without a title, the first of item 30"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_sources(tmp_path, case):
    files, found = BAD[case]
    with pytest.raises(UserError) as refused:
        main(write(tmp_path, **files))
    assert found in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["ml-100k.preprocess.run.json"]
    main(write(tmp_path))  # what failed does not refuse the corrected command


def test_the_command(tmp_path):
    done = run_stage("preprocess.movielens", "--output_dir", tmp_path, "--input_dir", tmp_path / "none", check=False)
    assert done.returncode == 2 and "none/ml-100k.inter: no such file or folder; check --input_dir" in done.stderr
    done = run_stage("preprocess.movielens", "--output_dir", tmp_path, "--max_history", 0, check=False)
    assert done.returncode == 2 and done.stderr == "error: --max_history 0: expected at least 1\n"
    assert not list(tmp_path.iterdir())
