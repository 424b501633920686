// The server as the page sees it: models, and one streamed chat. Keeps the key for this tab alone.

const KEY = "braid.key";

export class ApiError extends Error {
  constructor(status, body) {
    super(body?.error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

async function call(path, options = {}) {
  const headers = { ...(options.body && { "content-type": "application/json" }), ...(key.get() && { authorization: `Bearer ${key.get()}` }) };
  const answer = await fetch(path, { ...options, headers });
  if (!answer.ok) throw new ApiError(answer.status, await answer.json().catch(() => null));
  return answer;
}

export async function models() {
  const list = (await (await call("v1/models")).json()).data;
  return list.filter((model) => model.meta?.capabilities?.chat ?? true);
}

export const seesPictures = (model) => model?.meta?.capabilities?.vision === true;
export const drawsPictures = (model) => model?.meta?.capabilities?.image_generation === true;

// Yields the JSON of each event until [DONE]. Throws ApiError, also for an error in the middle of the stream.
export async function* chat(body, signal) {
  const answer = await call("v1/chat/completions", {
    method: "POST",
    signal,
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
  });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  while (true) {
    const { value, done } = await reader.read();
    if (done) throw new ApiError(0, { error: { message: "The connection ended before the answer did." } });
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data === "[DONE]") return;
      if (!data) continue;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(answer.status, chunk);
      yield chunk;
    }
  }
}
