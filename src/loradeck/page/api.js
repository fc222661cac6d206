/** The server's public HTTP API: every request of the page goes through here. */

const KEY = "loradeck.key"; // in sessionStorage: it is gone when the tab is closed
const RETRY = 2000; // milliseconds between two looks for a server that is gone
const CONNECTIONS = 6; // what a browser opens to a server at most; it counts requests without credentials apart
let apart = 0; // streams that are requested without credentials, of which the page has none

const BEAT = 5000; // milliseconds between two looks while the server answers

/** An error that the server answered with. */
export class ApiError extends Error {
  /**
   * @param {number} status HTTP's; 0 if the server did not answer
   * @param {string} message may have several lines
   * @param {string | null} [param] the field of the request that caused it
   */
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** Whether the server answers; listeners of `change` hear when that changes, those of `key` that a key is needed. */
export const connection = Object.assign(new EventTarget(), { online: true });

/** The API key of this tab. */
export const key = {
  /** @returns {string} "" if there is none */
  get value() {
    return sessionStorage.getItem(KEY) ?? "";
  },
  set value(text) {
    if (text) sessionStorage.setItem(KEY, text);
    else sessionStorage.removeItem(KEY);
  },
};

/**
 * Return the JSON of a GET request.
 * @param {string} path
 * @param {{signal?: AbortSignal}} [options]
 * @returns {Promise<any>}
 */
export async function get(path, options = {}) {
  return read(await request("GET", path, undefined, options.signal));
}

/**
 * Return the text of a GET request.
 * @param {string} path
 * @param {{signal?: AbortSignal}} [options]
 */
export async function getText(path, options = {}) {
  return (await request("GET", path, undefined, options.signal)).text();
}

/**
 * Send JSON, and return what comes back.
 * @param {string} path
 * @param {any} body
 * @param {{signal?: AbortSignal}} [options]
 * @returns {Promise<any>}
 */
export async function post(path, body, options = {}) {
  return read(await request("POST", path, JSON.stringify(body), options.signal));
}

/**
 * Send a DELETE request, and return what comes back.
 * @param {string} path
 * @returns {Promise<any>}
 */
export async function remove(path) {
  return read(await request("DELETE", path));
}

/**
 * Upload a form, and return what comes back.
 * @param {string} path
 * @param {FormData} form
 * @param {(share: number) => void} [onProgress] called with the share that has been sent, from 0 to 1
 * @param {AbortSignal} [signal]
 * @returns {Promise<any>}
 */
export function upload(path, form, onProgress = () => {}, signal) {
  return new Promise((resolve, reject) => {
    const sending = new XMLHttpRequest(); // fetch does not tell how much has been sent
    sending.open("POST", path);
    if (key.value) sending.setRequestHeader("authorization", `Bearer ${key.value}`);
    sending.upload.onprogress = (event) => event.lengthComputable && onProgress(event.loaded / event.total);
    sending.onload = () => {
      if (sending.status === 200) resolve(parse(sending.responseText));
      else reject(errorOf(sending.status, sending.responseText));
    };
    sending.onerror = () => reject(gone());
    sending.onabort = () => reject(new DOMException("The upload was stopped.", "AbortError"));
    signal?.addEventListener("abort", () => sending.abort());
    sending.send(form);
  });
}

/**
 * Send JSON, or nothing, and call `onEvent` with the JSON of each server-sent event until the stream ends.
 * @param {string} path
 * @param {any} body undefined sends a GET request
 * @param {(event: any) => void} onEvent
 * @param {AbortSignal} [signal]
 * @returns {Promise<void>}
 */
export async function stream(path, body, onEvent, signal) {
  const method = body === undefined ? "GET" : "POST";
  const text = body === undefined ? undefined : JSON.stringify(body);
  const credentials = apart < CONNECTIONS ? "omit" : "same-origin";
  apart += Number(credentials === "omit"); // so that the other requests do not wait for streams, nor a seventh stream
  try {
    await readEvents(await request(method, path, text, signal, credentials), onEvent);
  } finally {
    apart -= Number(credentials === "omit");
  }
}

/**
 * @param {Response} response
 * @param {(event: any) => void} onEvent
 */
async function readEvents(response, onEvent) {
  const reader = /** @type {ReadableStream<Uint8Array>} */ (response.body).getReader();
  const decoder = new TextDecoder();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : gone();
    });
    if (done) throw new ApiError(0, "The server ended the answer before it was complete.");
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = /** @type {string} */ (lines.pop());
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue; // a comment, or the end of an event
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.code, event.error.message, event.error.param);
      onEvent(event);
    }
  }
}

/**
 * @param {string} method
 * @param {string} path
 * @param {string} [body]
 * @param {AbortSignal} [signal]
 * @param {RequestCredentials} [credentials]
 * @returns {Promise<Response>}
 * @throws {ApiError}
 */
async function request(method, path, body, signal, credentials) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (body !== undefined) headers["content-type"] = "application/json";
  if (key.value) headers.authorization = `Bearer ${key.value}`;
  let response;
  try {
    response = await fetch(path, { method, body, headers, signal, credentials, cache: "no-store" });
  } catch (error) {
    if (signal?.aborted) throw error;
    throw gone();
  }
  setOnline(true);
  if (!response.ok) throw errorOf(response.status, await response.text().catch(() => ""));
  return response;
}

/** @param {Response} response */
async function read(response) {
  return parse(await response.text());
}

/** @param {string} text */
function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text; // vLLM's routes answer with plain text
  }
}

/**
 * @param {number} status
 * @param {string} text
 */
function errorOf(status, text) {
  const { error } = /** @type {any} */ (parse(text) || {});
  if (status === 401) connection.dispatchEvent(new Event("key"));
  return new ApiError(status, error?.message ?? `The server answered with ${status}.`, error?.param ?? null);
}

function gone() {
  setOnline(false);
  return new ApiError(0, "The server does not answer.");
}

/** @param {boolean} online */
function setOnline(online) {
  if (online === connection.online) return;
  connection.online = online;
  connection.dispatchEvent(new Event("change"));
  if (!online) look();
}

/** Notice when the server is gone, also while nothing is asked of it. */
export function watchConnection() {
  setInterval(() => {
    if (connection.online && !document.hidden) request("GET", "health").catch(() => {});
  }, BEAT);
}

/** Look for the server until it is back. */
async function look() {
  while (!connection.online) {
    await new Promise((resolve) => setTimeout(resolve, RETRY));
    await request("GET", "health").catch(() => {});
  }
}
