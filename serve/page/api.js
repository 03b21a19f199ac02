// The service's API, as the page uses it.

const COOKIE = "lop_key";

export class ApiError extends Error {
  constructor(status, detail) {
    super(detail);
    this.status = status;
  }
}

let key = sessionStorage.getItem(COOKIE) ?? "";

// Downloads are plain links, which cannot carry a header: a cookie of this site alone does it for them.
export function useKey(value) {
  key = value.trim();
  sessionStorage.setItem(COOKIE, key);
  const secure = location.protocol === "https:" ? "; Secure" : "";
  document.cookie = `${COOKIE}=${key}; SameSite=Strict; Path=/v1/${secure}`;
}

async function send(path, { method = "GET", body, signal } = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  if (answer.ok) return answer;
  const problem = await answer.json().catch(() => ({}));
  throw new ApiError(answer.status, problem.detail ?? `${answer.status} ${answer.statusText}`);
}

export const models = async () => (await (await send("/v1/models")).json()).models;

export const allocation = async (body, signal) => (await send("/v1/allocations", { method: "POST", body, signal })).json();

export const make = async (request) => (await send("/v1/checkpoints", { method: "POST", body: request })).json();

export const remove = (id) => send(`/v1/checkpoints/${id}`, { method: "DELETE" });

// Yields [event, data] until the server ends the stream. EventSource could not send the key.
export async function* follow(url, signal) {
  const answer = await send(`${url}/events`, { signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const blocks = text.split("\n\n");
    text = blocks.pop();
    for (const block of blocks) {
      const fields = Object.fromEntries(block.split("\n").map((line) => line.split(/: (.*)/s, 2)));
      if (fields.event) yield [fields.event, JSON.parse(fields.data)];
    }
  }
}
