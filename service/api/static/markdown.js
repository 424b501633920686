// Markdown of a reply that is still growing, as DOM nodes. Nothing that a model writes becomes markup that runs: no HTML passes
// markdown-it, DOMPurify goes over the rest, and the page's content security policy stands behind both.

const md = window.markdownit({ html: false, linkify: false, breaks: true }).disable("image");

window.DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer");
  }
});

function rendered(text) {
  const fragment = window.DOMPurify.sanitize(md.render(text), { RETURN_DOM_FRAGMENT: true, USE_PROFILES: { html: true }, FORBID_ATTR: ["style"] });
  for (const block of fragment.querySelectorAll("pre")) block.append(copyButton(() => block.querySelector("code").textContent));
  return fragment;
}

function copyButton(text) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    const value = text();
    await navigator.clipboard.writeText(value);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1200);
  });
  return button;
}

// Where the text so far falls apart into blocks that no later letter can change, and the rest: after the last blank line outside of
// a fence, unless what follows may belong to a list or a quotation.
function cut(text) {
  let isFenced = false, at = 0, place = 0;
  for (const line of text.split(/(?<=\n)/)) {
    place += line.length;
    if (/^ {0,3}(```|~~~)/.test(line)) isFenced = !isFenced;
    else if (!isFenced && line.trim() === "" && /^[^\s>*+\-\d]/.test(text.slice(place))) at = place;
  }
  return at;
}

export class MarkdownView {
  // Renders into `element`. While text arrives only the open block is drawn again, so that a long answer costs no more than a short one.
  constructor(element) {
    this.element = element;
    this.stable = document.createElement("div");
    this.tail = document.createElement("div");
    this.stable.className = "stable";
    this.tail.className = "tail";
    element.replaceChildren(this.stable, this.tail);
    this.open = "";
    this.frame = 0;
  }

  push(text) {
    this.open += text;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    this.frame = 0;
    const at = cut(this.open);
    if (at) {
      this.stable.append(rendered(this.open.slice(0, at)));
      this.open = this.open.slice(at);
    }
    this.tail.replaceChildren(rendered(this.open));
  }

  // The whole text once more in one piece: lists and references that were cut come out right.
  finish(text) {
    cancelAnimationFrame(this.frame);
    this.element.replaceChildren(rendered(text));
  }
}
