"""The chat in the terminal and as a page: answers against eval_vlm's and transformers', streaming, mistakes."""

import io
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from eval_data import environment, make_questions, make_vlm
from PIL import Image

from clipmoe_vlm.pictures import open_rgb
from clipmoe_vlm.runs import UserError
from eval_vlm import chat, routing_map, web
from eval_vlm.conversation import ChatModel, Conversation
from eval_vlm.generate import Answerer

# With turns of both sides and HTML's characters kept.
TEMPLATE = ("{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}{% if "
            "part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %} {% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_vlm(folder / "model", TEMPLATE)
    make_vlm(folder / "other", TEMPLATE, logit_scale=-1.0)
    make_questions(folder / "data", pictures=2)
    return folder


@pytest.fixture(scope="module")
def models(world):
    return [ChatModel(str(world / name), max_new_tokens=12) for name in ("model", "other")]


@pytest.fixture(scope="module")
def pictures(world):
    return [world / "data" / "images" / f"{index}.png" for index in range(2)]


# --- conversations ---------------------------------------------------------------------------------------------------


def test_the_first_answer_is_eval_vlms(models, pictures):
    record = {"id": 0, "image": pictures[0].name, "prompt": "Is there a cat?"}
    for model in models:
        (_, expected), = Answerer(model.model, model.processor, 1, 12).answers([record], pictures[0].parent)
        pieces = list(model.answer(Conversation(open_rgb(pictures[0])), "Is there a cat?"))
        assert "".join(pieces).strip() == expected["answer"] != "" and len(pieces) > 1


def test_later_answers_see_the_whole_conversation(models, pictures):
    model, conversation = models[0], Conversation(open_rgb(pictures[0]))
    first = "".join(model.answer(conversation, "Is there a cat?")).strip()
    second = "".join(model.answer(conversation, "And a dog?")).strip()
    text = f"user: <image>\nIs there a cat? assistant: {first} user: And a dog? assistant:"
    inputs = model.processor(text=text, images=conversation.picture, return_tensors="pt")
    tokens = model.model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1]:]
    assert second == model.processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    assert conversation.turns == [("Is there a cat?", first), ("And a dog?", second)]


def test_pieces_come_before_the_answer_ends_and_a_stop_keeps_what_was_said(models, pictures):
    model, conversation, stop = models[0], Conversation(open_rgb(pictures[0])), threading.Event()
    model.max_new_tokens = 100
    pieces = model.answer(conversation, "Go on.", stop)
    first = next(pieces)
    assert not conversation.turns  # the answer is not over
    stop.set()
    rest = list(pieces)
    assert conversation.turns == [("Go on.", (first + "".join(rest)).strip())]
    whole = "".join(model.answer(Conversation(conversation.picture), "Go on."))
    model.max_new_tokens = 12
    assert whole.strip().startswith(conversation.turns[0][1]) and len(rest) < 20 < len(whole)


def test_too_long_a_conversation_is_a_sentence_and_nothing_is_lost(models, pictures):
    conversation = Conversation(open_rgb(pictures[0]))
    list(models[0].answer(conversation, "Short?"))
    with pytest.raises(UserError, match="holds <image>"):
        list(models[0].answer(conversation, "What is <image>?"))
    with pytest.raises(UserError, match="the model has 256 positions; begin a new one"):
        list(models[0].answer(conversation, "word " * 300))
    assert len(conversation.turns) == 1


def test_the_map_shows_the_routers_choices_on_what_the_tower_saw(models, pictures):
    model, conversation = models[0], Conversation(open_rgb(pictures[0]))
    list(model.answer(conversation, "Cat?"))
    pixels = model.processor.image_processor(conversation.picture, return_tensors="pt")["pixel_values"]
    tower = model.model.model.vision_tower
    with torch.no_grad():
        logits = tower(pixels).router_logits
    for layer in routing_map.layers_of(conversation.routing):
        assert np.array_equal(routing_map.experts_of(conversation.routing, layer).ravel(),
                              logits[layer][1:].argmax(-1).numpy())
    # Cropped as the processor crops: the middle of the picture, 32 pixels a side.
    side = min(conversation.picture.size)
    left, top = ((size - side) // 2 for size in conversation.picture.size)
    middle = conversation.picture.crop((left, top, left + side, top + side)).resize((32, 32), Image.BICUBIC)
    assert conversation.seen.size == (32, 32)
    assert np.abs(np.asarray(middle, dtype=float) - np.asarray(conversation.seen, dtype=float)).mean() < 12
    maps = [np.asarray(routing_map.draw(conversation.seen, conversation.routing, layer))
            for layer in routing_map.layers_of(conversation.routing)]
    assert not np.array_equal(maps[0], maps[1])


# --- the terminal ----------------------------------------------------------------------------------------------------


def talk(models, capsys, *lines: str, picture=None) -> str:
    chat.Terminal(models, picture).run(io.StringIO("\n".join(lines) + "\n"))
    return capsys.readouterr().out


def test_two_models_answer_one_after_the_other(models, pictures, capsys, tmp_path):
    said = talk(models, capsys, f"/image {pictures[0]}", "Is there a cat?", f"/routing {tmp_path / 'map.png'}",
                f"/routing {tmp_path / 'first.png'} 0", picture=None)
    for model in models:
        answer = "".join(model.answer(Conversation(open_rgb(pictures[0])), "Is there a cat?")).strip()
        assert f"{model.name}: " in said and chat.printable(answer) in said
    for name in ("map_1.png", "map_2.png", "first_1.png", "first_2.png"):
        assert Image.open(tmp_path / name).width > 300


def test_mistakes_are_sentences_and_the_chat_goes_on(models, capsys, tmp_path):
    said = talk(models[:1], capsys, "/nothing", "/image nothing.png", "/routing x.png", "/image", "/help",
                "Without a picture?", "/quit", "never asked")
    for words in ("/nothing: no such command", "nothing.png: no picture that can be read", "no routing to draw",
                  "/image: no such command, or something is missing", "Ctrl-D"):
        assert words in said
    answer = "".join(models[0].answer(Conversation(), "Without a picture?")).strip()
    assert chat.printable(answer) in said and "never asked" not in said


def test_control_characters_and_markup_are_text(models, capsys):
    assert chat.printable("a\x1b[31mb\x07[bold]c\n") == "a[31mb[bold]c\n"
    assert "[red]" in talk(models[:1], capsys, "/image [red]x.png")


def test_questions_through_a_pipe_and_start_up_mistakes(world, pictures):
    def start(*arguments: str, said: str = "") -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-m", "eval_vlm.chat", *arguments], input=said, env=environment(),
                              capture_output=True, text=True, timeout=200)

    done = start(str(world / "model"), "--image", str(pictures[0]), "--max-new-tokens", "3", said="Is it?\n/quit\n")
    assert done.returncode == 0 and len(done.stdout.strip().splitlines()) >= 2, done.stderr
    for arguments, words in ((["--imagine"], "--help lists"), ([str(world / "data")], "no config.json"),
                             ([str(world / "model"), "--image", "nothing.png"], "no picture that can be read"),
                             ([str(world / "model"), "--max-new-tokens", "0"], "less than 1")):
        with pytest.raises(UserError, match=words):
            chat.main(arguments)


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'clipmoe-vlm\[chat\]'"):
        web.check_gradio()


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(models):
    pytest.importorskip("gradio")
    page = web.serve(models, None, "127.0.0.1", 0, block=False)
    yield page.local_url
    page.close()


def test_the_page(url, browser, models, pictures):
    context = browser.new_context()
    page = context.new_page()
    errors, hosts = [], set()
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: hosts.add(request.url.split("/")[2].split(":")[0]))
    page.goto(url)
    page.set_input_files("#picture input[type=file]", str(pictures[0]))
    page.wait_for_selector("#picture img")
    page.wait_for_timeout(1500)  # the upload is processed
    question = "<img src=x onerror=\"document.title='bad'\"><b>cat</b>?"
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.wait_for_selector("#map-1 img", timeout=60_000)
    for number, model in enumerate(models):
        answer = "".join(model.answer(Conversation(open_rgb(pictures[0])), question)).strip()
        said = page.inner_text(f"#chat-{number}")
        assert question in said and answer in said
        assert page.locator(f"#chat-{number} .message b, #chat-{number} .message img[src=x]").count() == 0
    assert page.title() == "CLIP-MoE chat"
    before = page.get_attribute("#map-0 img", "src")
    page.click("#layer input")
    page.click("[role=option] >> text=0")
    page.wait_for_function("before => document.querySelector('#map-0 img').src !== before",
                           arg=before if before.startswith("http") else url.rstrip("/") + before)
    page.click("text=Clear")
    page.wait_for_function("() => !document.querySelector('#chat-0').innerText.includes('cat')")
    assert hosts <= {"127.0.0.1"} and not errors, (hosts, errors)
    context.close()


def test_two_visitors_do_not_share_a_conversation(url, browser):
    contexts = [browser.new_context() for _ in range(2)]
    pages = [context.new_page() for context in contexts]
    for page in pages:
        page.goto(url)
        page.wait_for_selector("#question textarea")
    pages[0].fill("#question textarea", "only mine")
    pages[0].press("#question textarea", "Enter")
    pages[0].wait_for_function("() => document.querySelector('#chat-1').innerText.includes('only mine')")
    pages[1].fill("#question textarea", "and this is another")
    pages[1].press("#question textarea", "Enter")
    pages[1].wait_for_function("() => document.querySelector('#chat-1').innerText.includes('another')")
    assert "only mine" not in pages[1].inner_text("#chat-0") and "another" not in pages[0].inner_text("#chat-0")
    for context in contexts:
        context.close()


def test_questions_asked_meanwhile_and_again_do_not_mix_turns(models):
    pytest.importorskip("gradio")
    handlers = {one.name: one.fn for one in web.build(models).fns.values()}
    steps = handlers["ask"]("cat?", None, None, None)
    session = next(steps)[0]
    for more in (handlers["ask"]("dog?", None, session, None), handlers["again"](None, session, None)):
        (refused,) = more
        assert refused[1] in ("dog?", "cat?")
    list(steps)
    said = [list(one.turns) for one in session.conversations]
    assert [[question for question, _ in turns] for turns in said] == [["cat?"], ["cat?"]]
    session.conversations[1].turns[:] = [("earlier", "answer")]  # as if the question was too long for that model
    list(handlers["again"](None, session, None))
    assert session.conversations[0].turns == said[0]
    assert [question for question, _ in session.conversations[1].turns] == ["earlier", "cat?"]


def test_a_taken_port_is_a_sentence(url, models):
    with pytest.raises(UserError, match="can't be served at 127.0.0.1"):
        web.serve(models[:1], None, "127.0.0.1", int(url.rstrip("/").rsplit(":", 1)[1]), block=False)


