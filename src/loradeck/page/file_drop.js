/** A place to drop files on, with buttons for those who choose them. */

import { button, element } from "./dom.js";
import { notifyError } from "./notice.js";

const MAX_FILES = 1000; // of dropped folders

/** @typedef {{path: string, file: File}} DroppedFile a file, and its path within what was dropped */

for (const type of ["dragover", "drop"]) {
  // A file that is dropped beside the place would be opened instead of the page.
  window.addEventListener(type, (event) => {
    if (/** @type {DragEvent} */ (event).dataTransfer?.types.includes("Files")) event.preventDefault();
  });
}

/**
 * Return a place for files.
 * @param {object} options
 * @param {string} options.label what to drop
 * @param {string} [options.accept] as of an <input type="file">
 * @param {boolean} [options.multiple] whether several files may come at once
 * @param {boolean} [options.folders] whether folders may come, of which all files are taken
 * @param {(files: DroppedFile[]) => void} options.onFiles called with at least one file
 * @returns {HTMLElement}
 */
export function fileDrop({ label, accept = "", multiple = false, folders = false, onFiles }) {
  /** @param {DroppedFile[]} files */
  const take = (files) => {
    if (files.length > 1 && !multiple && !folders) notifyError(new Error("Choose one file."));
    else if (files.length) onFiles(files);
  };
  /**
   * @param {string} text
   * @param {Record<string, any>} properties
   */
  const choice = (text, properties) => {
    const input = element("input", {
      type: "file",
      hidden: true,
      "aria-label": `${label}: ${text}`,
      ...properties,
      onchange: () => {
        take([...(input.files ?? [])].map((file) => ({ path: file.webkitRelativePath || file.name, file })));
        input.value = ""; // so that the same file can be chosen again
      },
    });
    return [button(text, () => input.click()), input];
  };
  const place = element(
    "div",
    {
      class: "drop",
      ondragover: (/** @type {DragEvent} */ event) => {
        event.preventDefault();
        place.classList.add("over");
      },
      ondragleave: () => place.classList.remove("over"),
      ondrop: (/** @type {DragEvent} */ event) => {
        event.preventDefault();
        place.classList.remove("over");
        if (event.dataTransfer) walk(event.dataTransfer, folders).then(take, notifyError);
      },
    },
    element("p", {}, label),
    element(
      "div",
      { class: "row" },
      ...choice(multiple ? "Choose files…" : "Choose a file…", { accept, multiple }),
      ...(folders ? choice("Choose a folder…", { webkitdirectory: true }) : []),
    ),
  );
  return place;
}

/**
 * Return the files that were dropped, and those in dropped folders.
 * @param {DataTransfer} data valid until the event has been handled
 * @param {boolean} folders
 * @returns {Promise<DroppedFile[]>}
 */
async function walk(data, folders) {
  const entries = [...data.items].map((item) => item.webkitGetAsEntry()).filter((entry) => entry !== null);
  if (!entries.length) return [...data.files].map((file) => ({ path: file.name, file }));
  /** @type {DroppedFile[]} */
  const files = [];
  while (entries.length) {
    const entry = /** @type {FileSystemEntry} */ (entries.shift());
    if (entry.isFile) files.push({ path: entry.fullPath.replace(/^\//, ""), file: await fileOf(entry) });
    else if (!folders) throw new Error(`${entry.name} is a folder; drop a file.`);
    else entries.push(...(await entriesOf(entry)));
    if (files.length + entries.length > MAX_FILES) throw new Error(`There are more than ${MAX_FILES} files.`);
  }
  return files;
}

/**
 * @param {FileSystemEntry} entry
 * @returns {Promise<File>}
 */
function fileOf(entry) {
  return new Promise((resolve, reject) => /** @type {FileSystemFileEntry} */ (entry).file(resolve, reject));
}

/**
 * @param {FileSystemEntry} folder
 * @returns {Promise<FileSystemEntry[]>}
 */
async function entriesOf(folder) {
  const reader = /** @type {FileSystemDirectoryEntry} */ (folder).createReader();
  const entries = [];
  for (;;) {
    // It gives some at a time, and none at the end.
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return entries;
    entries.push(...some);
  }
}
