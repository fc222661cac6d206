/** The fine-tuning jobs of the server: how many there are, and how far the running ones are. */

import * as address from "./address.js";
import { element, replace } from "./dom.js";
import { count, number } from "./format.js";
import { history } from "./metrics.js";
import { session } from "./session.js";

/**
 * Return the list, and a function that draws it from the newest metrics.
 * @returns {{element: HTMLElement, draw: () => void}}
 */
export function runningJobs() {
  const counts = element("p");
  const list = element("ul", { class: "stack jobs" });
  const card = element("div", { class: "card", hidden: true }, element("h2", {}, "Jobs"), counts, list);

  function draw() {
    const statuses = history.series("loradeck_jobs").filter(({ labels }) => history.value("loradeck_jobs", labels) > 0);
    card.hidden = !statuses.length;
    counts.textContent = statuses.map(({ last, labels }) => `${count(last)} ${labels.status}`).join(", ");
    const running = history.series("loradeck_job_steps").filter(({ values }) => !Number.isNaN(values.at(-1)));
    replace(list, ...running.map(({ labels }) => jobItem(labels.job, labels.name)));
  }
  return { element: card, draw };
}

/**
 * @param {string} job
 * @param {string} name
 */
function jobItem(job, name) {
  const [steps, total, loss] = ["steps", "total_steps", "loss"].map((what) => history.value(`loradeck_job_${what}`, { job }));
  const title = session.rights?.train ? element("a", { href: address.link("train", { job }) }, name) : name;
  return element(
    "li",
    { class: "row" },
    title,
    element("progress", { max: total || 1, value: steps, "aria-label": `Steps of ${name}` }),
    ` ${count(steps)} of ${count(total)} steps`,
    !Number.isNaN(loss) && `, loss ${number(loss)}`,
  );
}
