// The chat page: conversations kept in this browser, one of them open, one answer at a time.
// A message is {role, text, images, numLost, reasoning, calls, stats, note, error}; a conversation {id, title, model, settings, messages}.
// images: data URLs; numLost: how many of them there was no room to keep.
// Long, because all that is seen hangs on the one conversation that is open; what does not has files of its own.

import { ApiError, chat, drawsPictures, key, models, seesPictures } from "./api.js";
import { keep, keepChats, loadChats } from "./keeping.js";
import { MarkdownView } from "./markdown.js";
import { MAX_PICTURES, drawing, isPicture, picture, urlOf } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const THEME = "braid.theme", MAX_TITLE = 48, MAX_ALT = 120;
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let served = [];
let kept = loadChats();
let open = fresh();
let attached = []; // {url, name} of the message that is being written
let numReading = 0; // files that are becoming one of them
let running = null;

// ---- keeping

function keepOpen() {
  if (open.messages.length) save([open, ...kept.filter((one) => one.id !== open.id)]);
}

// The open chat stays whole as long as it is open.
function save(chats) {
  kept = keepChats(chats).map((one) => (one.id === open.id ? open : one));
}

function fresh() {
  return { id: crypto.randomUUID?.() ?? String(Math.random()), title: "", model: "", settings: {}, messages: [] };
}

// ---- small builders

function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  made.className = className;
  made.textContent = text;
  return made;
}

function button(text, action, label = "") {
  const made = element("button", "", text);
  made.type = "button";
  if (label) made.ariaLabel = label;
  made.addEventListener("click", action);
  return made;
}

// ---- the list of chats

function showList() {
  $("conversations").replaceChildren(...kept.map((one) => {
    const entry = element("div", one.id === open.id ? "entry is-open" : "entry");
    const choose = button(one.title || "Chat", () => show(one));
    choose.className = "open";
    if (one.id === open.id) choose.ariaCurrent = "true";
    const drop = button("✕", () => remove(one), `Delete ${one.title || "chat"}`);
    drop.className = "drop";
    entry.append(choose, drop);
    return entry;
  }));
}

function remove(one) {
  save(kept.filter((other) => other.id !== one.id));
  if (one.id === open.id) show(fresh());
  else showList();
}

function show(one) {
  running?.abort();
  open = one;
  if (served.some((model) => model.id === one.model)) $("model").value = one.model;
  for (const name of [...NUMBERS, "system", "reasoning_effort"]) $(name).value = one.settings[name] ?? "";
  $("messages").replaceChildren(...one.messages.map((message, index) => drawn(message, index)));
  $("empty").hidden = one.messages.length > 0;
  showModel();
  showList();
  showMenu(false);
  scrollDown(true);
  $("prompt").focus({ preventScroll: true });
}

// ---- one message

function drawn(message, index) {
  const box = element("article", `message ${message.role}`);
  box.ariaLabel = message.role === "user" ? "You" : "Model";
  if (message.reasoning) box.append(thoughts(message.reasoning));
  const isUser = message.role === "user";
  const urls = (message.images ?? []).filter(isPicture);
  const text = element("div", "text");
  if (isUser) text.textContent = message.text;
  else new MarkdownView(text).finish(message.text);
  if (isUser && urls.length) box.append(pictures(urls.map((url, at) => picture(url, `Attached picture ${at + 1}`))));
  if (message.text) box.append(text);
  if (!isUser && urls.length) box.append(pictures(urls.map((url, at) => drawing(url, altOf(index, at + 1), at + 1))));
  box.append(...(message.calls ?? []).map(drawnCall), ...notes(message), line(message, index));
  return box;
}

function thoughts(text) {
  const details = element("details", "reasoning");
  details.append(element("summary", "", "Reasoning"), element("div", "", text));
  return details;
}

function pictures(made) {
  const box = element("div", "pictures");
  box.append(...made);
  return box;
}

// What is known of a drawing is what was asked for. index: of its message.
function altOf(index, number) {
  const asked = open.messages[index - 1]?.text ?? "";
  return `Picture ${number}, drawn by the model${asked && `, for: ${asked.length > MAX_ALT ? `${asked.slice(0, MAX_ALT)}…` : asked}`}`;
}

const drawnCall = (call) => element("pre", "call", `${call.name}(${call.arguments})`);

function notes(message) {
  const found = (message.warnings ?? []).map((text) => element("p", "note", text));
  if (message.numLost) found.push(element("p", "note", "There was no room in this browser to keep the pictures of this message."));
  if (message.note) found.push(element("p", "note", message.note));
  if (message.error) found.push(element("p", "note bad", message.error));
  return found;
}

function line(message, index) {
  const row = element("div", "line");
  if (message.role === "user") {
    row.append(button("Edit", () => edit(index)));
    return row;
  }
  if (message.stats) row.append(element("span", "stats", message.stats));
  if (message.text) row.append(button("Copy", () => navigator.clipboard.writeText(message.text)));
  if (index === open.messages.length - 1) row.append(button("Try again", () => again(index)));
  return row;
}

function edit(index) {
  if (running) return;
  const message = open.messages[index];
  open.messages.length = index;
  attached = (message.images ?? []).filter(isPicture).map((url) => ({ url, name: "" }));
  show(open);
  $("prompt").value = message.text;
  showAttached();
  grow();
}

function again(index) {
  if (running) return;
  open.messages.length = index;
  show(open);
  answer();
}

// ---- asking

function request() {
  const settings = open.settings;
  const body = { model: $("model").value, messages: turns() };
  if (settings.system) body.messages.unshift({ role: "system", content: settings.system });
  if (drawsPictures(chosen())) body.modalities = ["text", "image"];
  for (const name of NUMBERS) if (settings[name] !== undefined && settings[name] !== "") body[name] = Number(settings[name]);
  if (settings.reasoning_effort) body.reasoning_effort = settings.reasoning_effort;
  return body;
}

// The conversation as the server takes it; of its pictures the newest, as many as fit, and none for a model that is blind.
function turns() {
  const found = [];
  const canSee = seesPictures(chosen());
  let room = MAX_PICTURES;
  for (const message of [...open.messages].reverse()) {
    const urls = canSee && room ? (message.images ?? []).filter(isPicture).slice(-room) : [];
    room -= urls.length;
    const turn = turnOf(message, urls.map((url) => ({ type: "image_url", image_url: { url } })));
    if (turn) found.unshift(turn);
  }
  return found;
}

function turnOf({ role, text }, images) {
  if (role === "user") {
    return { role, content: images.length ? [...images, ...(text ? [{ type: "text", text }] : [])] : text };
  }
  return text || images.length ? { role, content: text, ...(images.length && { images }) } : null;
}

function send() {
  const text = $("prompt").value.trim();
  const images = seesPictures(chosen()) ? attached.map((one) => one.url) : [];
  if (running || numReading || !$("model").value || (!text && !images.length)) return;
  open.messages.push({ role: "user", text, images });
  open.title ||= text.slice(0, MAX_TITLE) || "Picture";
  $("prompt").value = "";
  if (images.length) attached = [];
  say("");
  showAttached();
  grow();
  $("empty").hidden = true;
  $("messages").append(drawn(open.messages.at(-1), open.messages.length - 1));
  answer();
}

async function answer() {
  const conversation = open;
  const message = { role: "assistant", text: "", images: [], reasoning: "", calls: [], warnings: [] };
  const live = new LiveMessage(message, open.messages.length);
  const stop = (running = new AbortController());
  document.body.classList.add("is-running");
  $("send").ariaLabel = "Stop";
  $("messages").append(live.box);
  scrollDown(true);
  const body = request();
  conversation.model = body.model;
  conversation.messages.push(message);
  try {
    for await (const chunk of chat(body, stop.signal)) live.take(chunk);
  } catch (error) {
    if (stop.signal.aborted) message.note = "Stopped.";
    else message.error = error.message || "The server can't be reached.";
    if (error instanceof ApiError && error.status === 401) askForKey();
  }
  live.end();
  running = null;
  document.body.classList.remove("is-running");
  $("send").ariaLabel = "Send";
  if (open === conversation) {
    live.box.replaceWith(drawn(message, conversation.messages.length - 1));
    keepOpen();
  }
  showList();
  scrollDown();
}

class LiveMessage {
  // A message while it arrives: adds to the page what is new, and to the message what will be kept.
  constructor(message, index) {
    this.message = message;
    this.index = index;
    this.box = element("article", "message assistant");
    this.text = element("div", "text waiting");
    this.stats = element("span", "stats");
    const row = element("div", "line");
    row.append(this.stats);
    this.box.append(this.text, row);
    this.view = null;
    this.started = performance.now();
    this.first = 0;
    this.count = 0;
  }

  take(chunk) {
    const message = this.message;
    if (chunk.warnings) message.warnings.push(...chunk.warnings);
    const choice = chunk.choices?.[0];
    const delta = choice?.delta ?? {};
    if (delta.reasoning_content ?? delta.reasoning) this.think(delta.reasoning_content ?? delta.reasoning);
    if (delta.content) this.write(delta.content);
    for (const call of delta.tool_calls ?? []) this.call(call);
    for (const image of delta.images ?? []) this.draw(image?.image_url?.url);
    if (choice?.finish_reason === "length") message.note = "The answer was cut at the limit of tokens.";
    if (chunk.usage || chunk.timings) this.sum(chunk.usage, chunk.timings);
    scrollDown();
  }

  tick() {
    this.first ||= performance.now();
    this.count += 1;
    const seconds = (performance.now() - this.first) / 1000;
    if (seconds > 0.2) this.stats.textContent = `${(this.count / seconds).toFixed(0)} tokens/s`;
  }

  write(text) {
    if (!this.view) {
      this.text.classList.remove("waiting");
      this.view = new MarkdownView(this.text);
    }
    this.message.text += text;
    this.view.push(text);
    this.tick();
  }

  think(text) {
    if (!this.message.reasoning) {
      this.thoughts = thoughts("");
      this.thoughts.open = true;
      this.text.before(this.thoughts);
    }
    this.message.reasoning += text;
    this.thoughts.lastChild.append(text);
    this.tick();
  }

  call(delta) {
    const calls = this.message.calls;
    if (!calls[delta.index]) {
      calls[delta.index] = { name: "", arguments: "" };
      this.lastCall = element("pre", "call");
      this.box.lastChild.before(this.lastCall);
      this.text.classList.remove("waiting");
    }
    const call = calls[delta.index];
    call.name += delta.function?.name ?? delta.custom?.name ?? "";
    call.arguments += delta.function?.arguments ?? delta.custom?.input ?? "";
    this.lastCall.textContent = `${call.name}(${call.arguments})`;
    this.tick();
  }

  draw(url) {
    if (!isPicture(url)) return;
    const number = this.message.images.push(url);
    if (!this.pictures) this.text.after((this.pictures = pictures([])));
    this.text.classList.remove("waiting");
    this.pictures.append(drawing(url, altOf(this.index, number), number));
  }

  sum(usage, timings) {
    const parts = [];
    const seconds = (timings?.decode_ms ?? 0) / 1000;
    if (usage && seconds > 0) parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(0)} tokens/s`);
    if (usage) {
      const cached = usage.prompt_tokens_details?.cached_tokens ?? 0;
      parts.push(`${usage.completion_tokens} tokens`, `${usage.prompt_tokens} in the prompt${cached ? `, ${cached} cached` : ""}`);
    }
    if (timings) parts.push(`queue ${ms(timings.queue_ms)}, prefill ${ms(timings.prefill_ms)}, decode ${ms(timings.decode_ms)}`);
    this.message.stats = parts.join(" · ");
  }

  end() {
    this.text.classList.remove("waiting");
  }
}

const ms = (value) => (value >= 1000 ? `${(value / 1000).toFixed(1)} s` : `${Math.round(value ?? 0)} ms`);

// ---- around the thread

let isPinned = true; // at the end of the thread, and staying there
$("thread").addEventListener("scroll", () => {
  const thread = $("thread");
  isPinned = thread.scrollHeight - thread.scrollTop - thread.clientHeight < 48;
});

function scrollDown(isForced = false) {
  if (isForced || isPinned) requestAnimationFrame(() => ($("thread").scrollTop = $("thread").scrollHeight));
}

function grow() {
  const prompt = $("prompt");
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

function showMenu(isOpen) {
  document.body.classList.toggle("is-menu", isOpen);
  $("shade").hidden = !isOpen;
  $("menu").ariaExpanded = String(isOpen);
}

const chosen = () => served.find((one) => one.id === $("model").value);

function showModel() {
  const model = chosen();
  $("context").textContent = model?.max_model_len ? `${model.max_model_len.toLocaleString("en")} tokens of context` : "";
  $("attach").hidden = !seesPictures(model);
  showAttached();
}

// Pictures wait, unseen, while a model is chosen that can't see them.
function showAttached() {
  $("attached").hidden = !attached.length || !seesPictures(chosen());
  $("attached").replaceChildren(...attached.map((one, index) => {
    const figure = element("figure");
    const alt = `Attached picture ${index + 1}${one.name && `: ${one.name}`}`;
    figure.append(picture(one.url, alt), button("✕", () => detach(index), `Remove picture ${index + 1}`));
    return figure;
  }));
}

function detach(index) {
  attached.splice(index, 1);
  showAttached();
  say("Picture removed.");
  ($("attached").querySelectorAll("button")[Math.min(index, attached.length - 1)] ?? $("prompt")).focus();
}

async function attach(files) {
  if (!files.length || !seesPictures(chosen())) return;
  numReading += 1;
  const complaints = [];
  for (const file of files) {
    if (attached.length >= MAX_PICTURES) {
      complaints.push(`A message can have ${MAX_PICTURES} pictures.`);
      break;
    }
    try {
      attached.push({ url: await urlOf(file), name: file.name });
    } catch {
      complaints.push(`${file.name || "This file"} can’t be read as a picture.`);
    }
  }
  numReading -= 1;
  showAttached();
  say(complaints.join(" ") || `Pictures attached: ${attached.length}.`, complaints.length > 0);
}

// To screen readers, and to everybody what went wrong.
function say(text, isBad = false) {
  $("notice").className = isBad ? "note bad" : "visually-hidden";
  $("notice").textContent = text;
}

const hasFiles = (event) => event.dataTransfer?.types.includes("Files") ?? false;
const showDropping = (isOver) => document.body.classList.toggle("is-dropping", isOver);

async function connect() {
  try {
    served = await models();
  } catch (error) {
    $("served").textContent = error.message || "The server can't be reached.";
    if (error instanceof ApiError && error.status === 401) askForKey();
    else setTimeout(connect, 3000);
    return;
  }
  const wanted = open.model || $("model").value;
  $("model").replaceChildren(...served.map((model) => {
    const option = element("option", "", model.id);
    option.value = model.id;
    option.selected = model.id === wanted;
    return option;
  }));
  $("served").textContent = served.length ? "Everything stays on this server." : "No model that chats is served here.";
  $("send").disabled = !served.length;
  showModel();
}

function askForKey() {
  if ($("ask").open) return;
  $("secret").value = key.get();
  $("ask").showModal();
}

const THEMES = ["system", "light", "dark"];
function showTheme(theme) {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = `Theme: ${theme}`;
  keep(THEME, theme);
}

// ---- wiring

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else send();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!running) send();
  }
});
$("prompt").addEventListener("input", grow);
$("prompt").addEventListener("paste", (event) => {
  // Where text comes with a picture of it, as from a spreadsheet, the text is meant.
  if (!event.clipboardData.types.includes("text/plain")) attach([...event.clipboardData.files]);
});
$("attach").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  const files = [...$("file").files];
  $("file").value = "";
  attach(files);
});
document.addEventListener("dragover", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault(); // or the browser would leave the page for the file
  event.dataTransfer.dropEffect = seesPictures(chosen()) ? "copy" : "none";
  showDropping(seesPictures(chosen()));
});
document.addEventListener("dragleave", (event) => event.relatedTarget || showDropping(false));
document.addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  showDropping(false);
  attach([...event.dataTransfer.files]);
});
// Pictures have no height before they are decoded.
$("messages").addEventListener("load", () => scrollDown(), { capture: true });
$("model").addEventListener("change", showModel);
$("new").addEventListener("click", () => show(fresh()));
$("menu").addEventListener("click", () => showMenu(!document.body.classList.contains("is-menu")));
$("shade").addEventListener("click", () => showMenu(false));
document.addEventListener("keydown", (event) => event.key === "Escape" && showMenu(false));
$("tune").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("tune").ariaExpanded = String(!$("settings").hidden);
});
$("settings").addEventListener("input", (event) => { open.settings[event.target.id] = event.target.value; });
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("theme").addEventListener("click", () => showTheme(THEMES[(THEMES.indexOf(localStorage.getItem(THEME) ?? "system") + 1) % THEMES.length]));
$("key").addEventListener("click", askForKey);
$("ask").addEventListener("close", () => {
  if ($("ask").returnValue === "ok") key.set($("secret").value.trim());
  $("secret").value = "";
  if ($("ask").returnValue === "ok") connect();
});

showTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "system");
showList();
connect();
