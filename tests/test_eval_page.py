"""report.html and compare.html, read and used in headless Chromium as a reader would."""

import json
import re
import time
from pathlib import Path

import pytest
from page_data import draw_pictures, guess, make_pope, routing_row, write_lines, write_run
from PIL import Image
from suites_data import MAKERS

from clipmoe_vlm.runs import UserError
from eval_vlm import compare, page_questions
from eval_vlm.config import SOURCE, EvalConfig, PopeConfig
from eval_vlm.page import write_compare_page, write_run_page
from eval_vlm.predictions import predictions_file


def config_of(world: Path, model: str, **more) -> EvalConfig:
    return EvalConfig(model=model, output_dir="", suites=["pope"], max_new_tokens=16,
                      pope=PopeConfig(str(world / "pope"), str(world / "images")), **more)


def rows_of(run: Path, suite: str = "pope") -> list[dict]:
    return [json.loads(line) for line in predictions_file(run, suite).read_text().splitlines()]


def is_right(row: dict) -> bool:
    """POPE's official rule in a line, for answers like `guess`'s."""
    return ("no" if row["answer"].startswith("No") else "yes") == row["label"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """180 questions about 30 pictures; `a`: no experts, `b`: with routing and a processor that pads; compared in b."""
    folder = make_pope(tmp_path_factory.mktemp("pages"), 30)
    draw_pictures(folder / "images", 30, (160, 120))
    Image.new("RGB", (160, 80), (200, 40, 40)).save(folder / "images" / "0.jpg", quality=95)
    (folder / "model").mkdir()
    (folder / "model" / "processor_config.json").write_text(json.dumps({"image_processor": {
        "do_pad": True, "do_center_crop": True, "size": {"shortest_edge": 96}, "crop_size": {"height": 96}}}))
    a = write_run(folder / "a", config_of(folder, "dense"), guess(1, 0.6))
    b = write_run(folder / "b", config_of(folder, str(folder / "model")), guess(2, 0.8), routing_row)
    write_run_page(a)
    write_run_page(b)
    compare.main([str(a), str(b)])
    return folder


@pytest.fixture
def opened(browser):
    """Opens a file; afterwards there must have been no message on the console and no request for anything else."""
    complaints, contexts = [], []

    def open_page(file: Path, address: str = "", width: int = 1280, **options):
        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: complaints.append(request.url)
                if not request.url.startswith((file.as_uri(), "data:")) else None)
        page.goto(file.as_uri() + address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def counted(page) -> int:
    return int(page.inner_text("#count").split()[0].replace(",", ""))


def chosen(page) -> str:
    return page.get_attribute("#list [aria-selected=true]", "id")


def cells(page, row: str) -> list[str]:
    return [text.split("\n")[0] for text in page.locator(row).locator("xpath=./*").all_inner_texts()]


def test_the_tables_say_what_the_scores_and_plain_counts_say(world, opened):
    page = opened(world / "b" / "report.html")
    scores = json.loads((world / "b" / "scores.json").read_text())["suites"]["pope"]
    heads = cells(page, "#papers thead tr")
    assert heads[1:] == ["VQAv2", "GQA", "VizWiz", "SQA-I", "TextVQA", "POPE", "MME", "MMBench", "MMBench-CN", "SEED",
                         "LLaVA-W", "MM-Vet", "MMStar", "OCRBench"]
    values = dict(zip(heads, cells(page, "#papers tbody tr"), strict=True))
    assert values.pop("model") == "model" and values.pop("POPE") == f"{100 * scores['mean']['f1']:.1f}"
    assert set(values.values()) == {"–"}
    low, high = (100 * bound for bound in scores["mean"]["f1_interval"])
    assert f"{low:.1f} to {high:.1f}" in page.inner_text("#papers") and "mean F1 of the three sets" in page.content()
    for name in ("random", "popular", "adversarial"):
        row = page.locator(".details tr").filter(has=page.get_by_role("rowheader", name=name, exact=True))
        assert f"{100 * scores[name]['accuracy']:.1f}" in row.inner_text()
        assert scores[name]["questions_sha256"] == page.get_attribute(f".hash:has-text('{name} ')", "title")
        bar = row.locator("svg")
        assert float(bar.locator(".value").get_attribute("width")) == pytest.approx(100 * scores[name]["accuracy"])
        assert float(bar.locator(".chance").get_attribute("x1")) == 50
        assert [float(bar.locator(".whisker").get_attribute(x)) for x in ("x1", "x2")] == pytest.approx(
            [100 * bound for bound in scores[name]["accuracy_interval"]])

    rows = rows_of(world / "b")
    plain = {}
    for row in rows:
        thing = re.fullmatch(r"Is there an? (.*) in the image\?", row["question"])[1]
        cell = ("T" if is_right(row) else "F") + ("P" if (row["label"] == "yes") == is_right(row) else "N")
        plain.setdefault(thing, dict.fromkeys(("FP", "FN", "TP", "TN"), 0))[cell] += 1
    table = [cells(page, f".objects tbody tr >> nth={index}") for index in range(len(plain))]
    assert {name: [int(cell) for cell in rest] for name, *rest in table} == \
        {name: list(one.values()) for name, one in plain.items()}
    errors = [int(row[1]) + int(row[2]) for row in table]
    assert errors == sorted(errors, reverse=True)

    random_set = [row for row in rows if row["category"] == "random"]
    yes = sum(not row["answer"].startswith("No") for row in random_set) / len(random_set)
    assert cells(page, "#yes tbody tr >> nth=0")[3] == f"{100 * yes:.1f}%"
    cut, empty = sum(row.get("cut", False) for row in rows), sum(not row["answer"] for row in rows)
    assert cut and empty and f"POPE: {cut} of 180 answers" in page.inner_text(".warnings")
    assert f"POPE: {empty} of 180 answers" in page.inner_text(".warnings")


def test_filters_count_as_plain_python_does(world, opened):
    page = opened(world / "b" / "report.html")
    rows = rows_of(world / "b")
    assert counted(page) == 180 and page.get_attribute("#count", "aria-live") == "polite"
    tests = {"all": lambda row: True, "right": is_right, "wrong": lambda row: not is_right(row),
             "cut": lambda row: row.get("cut"), "empty": lambda row: not row["answer"]}
    assert page.locator("#show option").count() == len(tests)
    for show, test in tests.items():
        page.get_by_label("show").select_option(show)
        for name in ("", "popular"):
            page.get_by_label("set", exact=True).select_option(name)
            for text in ("", "Cat IN the"):
                page.get_by_label("text").fill(text)
                wanted = [row for row in rows if test(row) and name in ("", row["category"])
                          and text.lower() in row["question"].lower()]
                assert counted(page) == len(wanted)
                if wanted:
                    assert page.inner_text("#list li .question") == wanted[0]["question"]
    page.get_by_role("button", name="cat", exact=True).click()
    assert counted(page) == sum("a cat in" in row["question"] for row in rows)
    assert page.evaluate("document.activeElement.id") == "list"


def test_a_reader_gets_about_with_the_keyboard_alone(world, opened):
    page = opened(world / "b" / "report.html")
    reached = []
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none"
        if reached[-1] == "list":
            break
    assert reached[-5:] == ["show", "suite", "set", "text", "list"]
    for key, row in (("j", 1), ("ArrowDown", 2), ("k", 1), ("ArrowUp", 0), ("k", 0), ("PageDown", 10), ("End", 179),
                     ("j", 179), ("Home", 0)):
        page.keyboard.press(key)
        assert chosen(page) == page.get_attribute("#list", "aria-activedescendant") == f"question-{row}"
    for _ in range(51):
        page.keyboard.press("j")
    assert chosen(page) == "question-51" and page.inner_text("#page") == "51 to 100 of 180"
    row = rows_of(world / "b")[51]
    assert row["question"] in page.inner_text("#detail") and row["id"] in page.inner_text("#detail")
    item, box = (page.locator(place).bounding_box() for place in ("#list [aria-selected=true]", "#list"))
    assert box["y"] <= item["y"] and item["y"] + item["height"] <= box["y"] + box["height"] + 1
    page.keyboard.press("Shift+Tab")
    page.keyboard.type("jk")  # letters in a text field are letters
    assert page.input_value("#text") == "jk" and counted(page) == 0
    assert page.locator("button, select, input").evaluate_all(
        "all => all.filter(one => !(one.labels?.length || one.textContent.trim())).length") == 0


def test_the_address_leads_back(world, opened):
    page = opened(world / "b" / "report.html")
    page.get_by_label("show").select_option("wrong")
    page.get_by_label("set", exact=True).select_option("random")
    page.locator("#list li").nth(3).click()
    page.wait_for_timeout(400)
    other = opened(world / "b" / "report.html", "#" + page.evaluate("location.hash.slice(1)"))
    assert other.inner_text("#detail") == page.inner_text("#detail") and counted(other) == counted(page)
    assert chosen(other) == "question-3" and other.input_value("#show") == "wrong"
    assert counted(opened(world / "b" / "report.html", "#show=nothing&set=x&id=y")) == 180


def pixel(page, row: int, column: int) -> list[int]:
    """Of the middle of a patch of the 6 x 6 map; read from a copy, since Chromium warns of repeated reading."""
    return page.evaluate("""([row, column]) => { const map = document.querySelector('canvas.map');
        const side = map.width / 6, copy = document.createElement('canvas');
        const pen = copy.getContext('2d');
        pen.drawImage(map, -(column + .5) * side, -(row + .5) * side);
        return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3) }""", [row, column])


def legend(page) -> list[list[int]]:
    colours = page.locator(".swatch").evaluate_all("all => all.map(one => getComputedStyle(one).backgroundColor)")
    return [[int(part) for part in re.findall(r"\d+", colour)] for colour in colours]


def test_the_routing_map_is_the_rows_and_lies_over_the_picture_as_the_tower_sees_it(world, opened):
    page = opened(world / "b" / "report.html")
    layers = routing_row("0.jpg")["layers"]
    assert "0.jpg" in page.inner_text("#detail figcaption >> nth=0")
    assert page.locator("#layer option").all_inner_texts() == ["0", "2", "8"]  # first, middle, last of five
    page.get_by_label("map without the picture").check()
    for layer in ("0", "8"):
        page.locator("#layer").select_option(layer)
        for row, column in ((0, 0), (0, 5), (3, 2), (5, 4)):
            assert pixel(page, row, column) == legend(page)[int(layers[layer][6 * row + column])]
        share = round(100 * layers[layer].count("1") / 36)
        assert f"expert 1: {share}%" in page.inner_text(".legend")
        assert f"expert 1 {share}% of the patches" in page.get_attribute("canvas.map", "aria-label")
    page.get_by_label("map without the picture").uncheck()
    page.wait_for_timeout(200)
    # A red picture twice as wide as high, padded: grey above and below. Half of it the expert's colour.
    for row, below in ((0, (128, 128, 128)), (2, (200, 40, 40)), (5, (128, 128, 128))):
        expert = legend(page)[int(layers["8"][6 * row + 3])]
        mixed = [(one + other) / 2 for one, other in zip(expert, below, strict=True)]
        assert pixel(page, row, 3) == pytest.approx(mixed, abs=6)
    assert opened(world / "a" / "report.html").locator("#routing, canvas").count() == 0


@pytest.mark.parametrize("processor, expected", [
    ({"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}},
     {"how": "crop", "zoom": 256 / 224}),
    ({"do_center_crop": False, "size": {"height": 384, "width": 384}}, {"how": "stretch"}),
    ({"image_processor_type": "LlavaNextImageProcessor", "size": {"shortest_edge": 336}}, {"how": "stretch"}),
    ({"size": 3}, None)])
def test_how_a_processor_fits_pictures_is_read_off_its_file(tmp_path, processor, expected):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert page_questions.fit(tmp_path) == expected
    assert page_questions.fit(tmp_path / "nowhere") is None


def test_a_comparison_shows_differences_and_flips(world, opened):
    result = json.loads((world / "b" / "compare.json").read_text())
    page = opened(world / "b" / "compare.html")
    line = result["suites"]["pope"]["mean F1"]
    difference = page.locator("#papers tr.difference td").nth(5).inner_text().split("\n")
    assert difference[0] == f"{100 * line['difference']:+.1f}"
    assert difference[1] == " to ".join(f"{100 * bound:+.1f}" for bound in line["interval"])
    assert difference[2].removeprefix("p ") == ("< 0.001" if line["p_value"] < 0.001 else f"{line['p_value']:.3f}")
    assert cells(page, "#papers tbody tr >> nth=1")[6] == f"{100 * line['b']:.1f}"
    a, b = ({row["id"]: row for row in rows_of(world / name)} for name in "ab")
    better = [question for question in a if is_right(b[question]) > is_right(a[question])]
    assert better == result["flips"]["pope"]["better"]
    counts = {"better": len(better), "worse": sum(is_right(b[one]) < is_right(a[one]) for one in a),
              "right": sum(is_right(b[one]) and is_right(a[one]) for one in a)}
    counts["flipped"] = counts["better"] + counts["worse"]
    counts["wrong"] = len(a) - counts["flipped"] - counts["right"]
    for show, count in counts.items():
        page.get_by_label("show").select_option(show)
        assert counted(page) == count
    page.get_by_label("show").select_option("better")
    assert better[0] in page.inner_text("#detail")
    assert page.locator("#detail .wrong").count() == page.locator("#detail .right").count() == 1
    assert page.locator("canvas.map").count() == 1  # only b has experts


def test_pages_fit_narrow_and_wide_windows_in_light_and_dark(world, opened):
    for file in ("report.html", "compare.html"):
        grounds = set()
        for width in (380, 1280):
            for scheme in ("light", "dark"):
                page = opened(world / "b" / file, width=width, color_scheme=scheme)
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                table = page.locator("#papers").bounding_box()
                assert width == 380 or table["x"] + table["width"] <= width  # the whole row without scrolling
                grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert len(grounds) == 2


EVIL = ("</script ><script>window.hacked=1</script><img src=x onerror=window.hacked=2>&amp;\u2028{{7*7}}"
        "<!--<script ")


def test_html_and_script_of_files_are_text(tmp_path, opened):
    name = "<b onclick=alert(1)>&.png"
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "pope").mkdir()
    write_lines(tmp_path / "pope" / "coco_pope_random.json", [
        {"question_id": EVIL, "image": name, "text": f"Is there a {EVIL} in the image?", "label": "yes"}])
    config = config_of(tmp_path, f"<i>{EVIL.replace('/', '')}", prompt_suffix=EVIL)
    config.pope = PopeConfig(str(tmp_path / "pope" / "coco_pope_random.json"), str(tmp_path))
    run = write_run(tmp_path / "run", config, lambda record: EVIL + "\ud83d", routing=None)
    page = opened(write_run_page(run))
    assert page.evaluate("window.hacked") is None and page.locator("h1 i, main img[src=x], main b").count() == 0
    assert f"Is there a {EVIL} in the image?" == page.text_content("#detail dd >> nth=0")
    assert EVIL in page.text_content("#detail dd >> nth=3") and name in page.text_content("#detail figcaption")
    assert "<i>" in page.inner_text("h1") and "onerror=" in page.text_content(".objects")
    assert "script-src 'sha256-" in page.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")


def test_a_picture_that_is_gone_or_broken_is_a_sentence(world, tmp_path, opened):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(b"no picture")
    config = config_of(world, "m")
    config.pope.image_folder = str(tmp_path / "images")
    page = opened(write_run_page(write_run(tmp_path / "run", config, guess(1, 0.5))))
    assert page.inner_text("#detail .absent") == "The picture was not there when this page was made."
    page.get_by_label("text").fill("1.jpg")
    page.keyboard.press("Tab")
    assert page.inner_text("#detail .absent") == "The picture could not be read when this page was made."


def test_a_model_that_always_says_yes_is_told_of(world, tmp_path):
    run = write_run(tmp_path / "run", config_of(world, "m", limit=60), lambda record: "Yes")
    page = write_run_page(run).read_text()
    assert "POPE, random: the model says yes to 100% of the questions, where 50% are right." in page
    assert "only the first questions were asked (limit=60)" in page


def test_a_comparison_of_runs_that_lack_something_is_one_sentence(world, tmp_path, capsys):
    for name in "ab":
        write_run(tmp_path / name, config_of(world, name), guess(1, 0.5))
    result = compare.compare_runs(tmp_path / "a", tmp_path / "b")
    lines = rows_of(tmp_path / "b")
    write_lines(predictions_file(tmp_path / "b", "pope"), lines[1:])
    with pytest.raises(UserError, match=rf"not answered the same questions of pope \(1 only in one, such as "
                                        rf"{lines[0]['id']}\); run eval_vlm.run on both"):
        write_compare_page(result, tmp_path / "compare.html")
    predictions_file(tmp_path / "b", "pope").unlink()
    with pytest.raises(UserError, match="pope.jsonl: there are no predictions for a page; run eval_vlm.run again"):
        write_compare_page(result, tmp_path / "compare.html")
    assert not (tmp_path / "compare.html").exists()
    write_lines(predictions_file(tmp_path / "b", "pope"), lines)
    (tmp_path / "a" / "config.yaml").unlink()
    compare.main([str(tmp_path / "a"), str(tmp_path / "b"), f"output={tmp_path / 'c.json'}"])
    assert re.search(r"no report: .*config.yaml", capsys.readouterr().out.replace("\n", " "))
    assert (tmp_path / "c.json").exists() and not (tmp_path / "c.html").exists()


def test_every_suite_has_its_column(tmp_path, opened):
    config = EvalConfig(model="m", output_dir="", suites=[name for name in MAKERS if name != "mme"])
    for name in config.suites:
        source = str(MAKERS[name](tmp_path / name)["dataset"][SOURCE[name]])
        getattr(config, name).image_folder = str(tmp_path / name / "pictures")
        setattr(getattr(config, name), SOURCE[name], source)
    run = write_run(tmp_path / "run", config, lambda record: "kite" if record["suite"] == "vqav2" else "A")
    page = opened(write_run_page(run))
    shown = dict(zip(cells(page, "#papers thead tr"), cells(page, "#papers tbody tr"), strict=True))
    assert {name for name, value in shown.items() if value == "–"} == {"MME", "LLaVA-W", "MM-Vet"}  # two need a judge
    assert "LLaVA-W, MM-Vet: run, but there is nothing to score" in page.content()
    scores = json.loads((run / "scores.json").read_text())["suites"]
    assert shown["VQAv2"] == f"{scores['vqav2']['scores']['overall']['score']:.1f}"
    page.get_by_label("suite").select_option("mmvet")
    assert page.input_value("#set") == "" and counted(page) == len(rows_of(run, "mmvet"))
    page.get_by_label("show").select_option("unscored")
    assert "not scored" in page.inner_text("#detail")
    compare.main([str(run), str(run), f"output={tmp_path / 'same.json'}"])
    same = opened(tmp_path / "same.html")
    assert set(cells(same, "#papers tr.difference")[1:]) == {"+0.0", "–"}


def test_3000_questions_about_500_pictures_stay_below_10_mb(tmp_path, opened):
    make_pope(tmp_path, 500)
    draw_pictures(tmp_path / "images", 500)
    run = write_run(tmp_path / "run", config_of(tmp_path, "m"), guess(1, 0.7),
                    lambda image: routing_row(image, (24, 24)))
    started = time.monotonic()
    file = write_run_page(run)
    assert time.monotonic() - started < 60  # seconds where nothing else runs
    assert 3_000_000 < file.stat().st_size < 10_000_000
    page = opened(file)
    assert counted(page) == 3000
    sides = page.evaluate("""async () => Promise.all([0, 250, 499].map(async (index) => {
        const image = new Image(); image.src = data.pictures[index].src; await image.decode();
        return image.naturalWidth }))""")
    assert min(sides) >= 160 and page.evaluate("data.pictures.every(one => one.src)")
    assert f"shrunk to {min(sides)} pixels" in page.inner_text("#left-out") or min(sides) == 320
    page.get_by_label("show").select_option("wrong")
    assert counted(page) == sum(not is_right(row) for row in rows_of(run))


def test_of_too_many_pictures_some_are_shown_and_it_says_so(world, tmp_path, monkeypatch, opened):
    monkeypatch.setattr(page_questions, "PICTURES", 8)
    run = write_run(tmp_path / "run", config_of(world, "m"), guess(1, 0.6))
    page = opened(write_run_page(run))
    assert page.evaluate("data.pictures.length") == 8 and counted(page) == 48
    assert "48 of 180 questions" in page.inner_text("#left-out")
    assert sum(int(row[3]) + int(row[1]) + int(row[2]) + int(row[4])
               for row in (cells(page, f".objects tbody tr >> nth={index}") for index in range(12))) == 180
