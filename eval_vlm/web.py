"""The chat as a page: picture in, questions, streamed answers of one model or two, the routing map beside it."""

from __future__ import annotations

import html
import os
import threading
from collections.abc import Iterator
from typing import Any

from PIL import Image

from clipmoe_vlm.runs import UserError
from eval_vlm import routing_map
from eval_vlm.conversation import ChatModel, Conversation

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
CSS = "footer {display: none !important}"


def check_gradio() -> None:
    """Raises:
        UserError: gradio is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise UserError("--web needs gradio: pip install 'clipmoe-vlm[chat]'") from None


class Session:
    """One visitor's conversations, and how to stop the answer that is being written."""

    def __init__(self, models: int):
        self.conversations = [Conversation() for _ in range(models)]
        self.stop = threading.Event()
        self.question = ""  # the last one
        self.answering = False
        self.closed = False  # another took its place: what is still being written is not shown


def serve(models: list[ChatModel], picture: Image.Image | None, host: str, port: int, block: bool = True) -> Any:
    """Starts the page and, unless `block` is false, stays until it is stopped.

    Raises:
        UserError: the address is taken or not this machine's.
    """
    page = build(models, picture)
    theme, css = look()
    if host not in ("127.0.0.1", "localhost"):
        print(f"listening on {host}: everybody who reaches it can use the models; there is no password")
    try:
        _, url, _ = page.queue(default_concurrency_limit=4).launch(
            server_name=host, server_port=port or None, share=False, quiet=True, prevent_thread_lock=True,
            theme=theme, css=css, footer_links=[], ssr_mode=False, enable_monitoring=False)
    except OSError as error:
        raise UserError(f"the page can't be served at {host}:{port} ({error}); name another --port or --host") from None
    print(f"the page: {url} (Ctrl-C ends)", flush=True)
    if block:
        page.block_thread()
    return page


def look() -> tuple[Any, str]:
    """A theme whose fonts are the machine's own: nothing is fetched from the network."""
    import gradio as gr

    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Default(font=fonts, font_mono=["ui-monospace", "monospace"]), CSS


def build(models: list[ChatModel], picture: Image.Image | None = None) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def session_of(session: Session | None) -> Session:
        return session or Session(len(models))

    def histories(session: Session, question: str = "", partial: list[str] | None = None) -> list[list[dict]]:
        """What the chat windows show: all turns, and those being written."""
        shown = []
        for number, conversation in enumerate(session.conversations):
            turns = list(conversation.turns)
            if partial and partial[number] is not None:
                turns.append((question, partial[number]))
            # The window takes HTML even without Markdown, so that tags are only text if they are escaped.
            shown.append([{"role": role, "content": html.escape(text).replace("\n", "<br>")} for turn in turns
                          for role, text in zip(("user", "assistant"), turn, strict=True)])
        return shown

    def new_picture(image: Image.Image | None, session: Session | None) -> tuple:
        session = session_of(session)
        session.stop.set()
        session.closed = True
        session = Session(len(models))
        for conversation in session.conversations:
            conversation.picture = image.convert("RGB") if image is not None else None
        return session, *histories(session), *maps(session, None)

    def ask(question: str, image: Image.Image | None, session: Session | None, layer: int | None) -> Iterator[tuple]:
        session = session_of(session)
        if not question.strip():
            yield session, "", *histories(session), *maps(session, layer)
            return
        if image is not None and session.conversations[0].picture is None and not session.conversations[0].turns:
            for conversation in session.conversations:
                conversation.picture = image.convert("RGB")
        if session.answering:  # asked again meanwhile: turns of two questions must not mix
            gr.Warning("an answer is being written; Stop ends it")
            yield session, question, *[gr.skip()] * (len(outputs) - 2)
            return
        session.question, session.answering = question, True
        try:
            yield from write(question, session, layer)
        finally:
            session.answering = False

    def write(question: str, session: Session, layer: int | None) -> Iterator[tuple]:
        session.stop = threading.Event()
        partial: list[str | None] = [""] * len(models)
        yield session, "", *histories(session, question, partial), *maps(session, layer)
        for number, (model, conversation) in enumerate(zip(models, session.conversations, strict=True)):
            stop = threading.Event()
            try:
                for piece in model.answer(conversation, question, stop):
                    partial[number] += piece
                    if session.stop.is_set():
                        stop.set()
                    if session.closed:
                        return
                    yield session, "", *histories(session, question, partial), *[gr.skip()] * (len(models) + 1)
            except (UserError, RuntimeError) as error:  # RuntimeError: such as too little memory
                gr.Warning(f"{model.name}: {str(error).splitlines()[0]}")
            partial[number] = None  # it is among the turns now
            if session.closed:
                return
            yield session, "", *histories(session, question, partial), *maps(session, layer)

    def again(image: Image.Image | None, session: Session | None, layer: int | None) -> Iterator[tuple]:
        """Takes the last question back and asks it anew (after another picture part, or a stop)."""
        session = session_of(session)
        if not session.answering:
            for conversation in session.conversations:  # one too long for a model has no turn of that question
                if conversation.turns and conversation.turns[-1][0] == session.question:
                    conversation.turns.pop()
        yield from ask(session.question, image, session, layer)

    def halt(session: Session | None) -> None:
        if session:
            session.stop.set()

    def maps(session: Session, layer: int | None) -> list[Any]:
        """The slider and each model's map."""
        rows = [conversation.routing for conversation in session.conversations]
        layers = sorted({number for row in rows if row for number in routing_map.layers_of(row)})
        if not layers:
            return [gr.update(visible=False), *[gr.update(visible=False) for _ in models]]
        chosen = layer if layer in layers else layers[-1]
        drawn = [gr.update(visible=False) if row is None or str(chosen) not in row["layers"] else
                 gr.update(visible=True, value=routing_map.draw(conversation.seen, row, chosen, model.name))
                 for model, row, conversation in zip(models, rows, session.conversations, strict=True)]
        return [gr.update(visible=True, choices=layers, value=chosen), *drawn]

    def redraw(session: Session | None, layer: int | None) -> list[Any]:
        return maps(session_of(session), layer)[1:]

    with gr.Blocks(title="CLIP-MoE chat", analytics_enabled=False, fill_width=True) as page:
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                image = gr.Image(value=picture, type="pil", label="Picture", sources=["upload", "clipboard"],
                                 height=320, elem_id="picture")
                layer = gr.Dropdown(choices=[], label="Routing of block", visible=False, elem_id="layer",
                                    interactive=True)
                drawn = [gr.Image(show_label=False, visible=False, interactive=False, elem_id=f"map-{number}",
                                  buttons=["download"], alt_text=f"{model.name}: each patch's first-choice expert")
                         for number, model in enumerate(models)]
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    windows = [gr.Chatbot(label=model.name, height=460, render_markdown=False, sanitize_html=True,
                                          elem_id=f"chat-{number}", buttons=["copy"],
                                          placeholder="Put a picture in and ask about it")
                               for number, model in enumerate(models)]
                question = gr.Textbox(label="Question", placeholder="What is in the picture?", elem_id="question",
                                      autofocus=True, submit_btn="Ask")
                with gr.Row():
                    stop, retry, clear = (gr.Button(name, size="sm") for name in ("Stop", "Ask again", "Clear"))

        outputs = [state, question, *windows, layer, *drawn]
        question.submit(ask, [question, image, state, layer], outputs, show_progress="hidden")
        retry.click(again, [image, state, layer], outputs, show_progress="hidden")
        stop.click(halt, [state], None, queue=False)
        for event in (clear.click, image.change, *(window.clear for window in windows)):
            event(new_picture, [image, state], [state, *windows, layer, *drawn])
        layer.input(redraw, [state, layer], drawn)
    return page
