// A conversation with the server that this page came from. Nothing is kept when the page is closed.

const element = (id) => document.getElementById(id);
const [messages, form, prompt, send, stop, key] = ["messages", "form", "prompt", "send", "stop", "key"].map(element);
let conversation = [];
let model = "";
let underWay = null;

function headers() {
  const found = { "Content-Type": "application/json" };
  if (key.value) found.Authorization = `Bearer ${key.value}`;
  return found;
}

function show(role, text = "") {
  const place = document.createElement("div");
  place.className = `message ${role}`;
  place.textContent = text;
  messages.append(place);
  messages.scrollTop = messages.scrollHeight;
  return place;
}

async function refused(response) {
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) key.hidden = false;
  return new Error(body.error?.message ?? `the server answers with status ${response.status}`);
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refused(response);
  model = (await response.json()).data[0].id;
  element("model").textContent = model;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(place) {
  underWay = new AbortController();
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal: underWay.signal,
    body: JSON.stringify({ model, messages: conversation, stream: true, stream_options: { include_usage: true } }),
  });
  if (!response.ok) throw await refused(response);
  const begun = performance.now();
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    const text = event.choices[0]?.delta.content;
    if (text) place.textContent += text;
    if (event.usage) {
      const seconds = (performance.now() - begun) / 1000;
      const count = event.usage.completion_tokens;
      show("counts", `${count} tokens, ${(count / seconds).toFixed(1)} a second`);
    }
    messages.scrollTop = messages.scrollHeight;
  }
}

function busy(on) {
  send.hidden = on;
  stop.hidden = !on;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const text = prompt.value.trim();
  if (!text || !send.offsetParent) return;
  prompt.value = "";
  conversation.push({ role: "user", content: text });
  const question = show("user", text);
  const place = show("assistant");
  const mine = conversation;
  busy(true);
  try {
    if (!model) await findModel();
    await answer(place);
    mine.push({ role: "assistant", content: place.textContent });
  } catch (error) {
    if (error.name === "AbortError") {
      mine.push({ role: "assistant", content: place.textContent });
    } else {
      // The question can be asked again.
      mine.pop();
      question.remove();
      place.remove();
      show("error", error.message);
      prompt.value = text;
    }
  } finally {
    busy(false);
    prompt.focus();
  }
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

stop.addEventListener("click", () => underWay?.abort());

element("new").addEventListener("click", () => {
  underWay?.abort();
  conversation = [];
  messages.replaceChildren();
  prompt.focus();
});

findModel().catch((error) => show("error", error.message));
