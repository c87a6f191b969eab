"use strict";
const SVG = "http://www.w3.org/2000/svg";
const data = (figure) => JSON.parse(figure.querySelector("script").textContent);

// A chart tells the values at the step the pointer is nearest to; the last ones otherwise.
for (const figure of document.querySelectorAll(".chart")) {
  const lines = data(figure);
  const svg = figure.querySelector("svg[role=img]");
  const cursor = svg.querySelector(".cursor");
  const outputs = [...figure.querySelectorAll("output")];
  const dots = [...figure.querySelectorAll(".key path")].map((path) => path.getAttribute("class").replace("line", "dot"));
  const at = figure.querySelector(".at");
  const lasts = outputs.map((output) => output.textContent);
  const last = at.textContent;
  const shape = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    cursor.append(element);
  };
  const nearest = (points, x) =>
    points.reduce((best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
  svg.addEventListener("pointermove", (event) => {
    const x = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
    const found = lines.map((points) => nearest(points, x));
    const [px, , step, , epoch] = nearest(found, x);
    cursor.replaceChildren();
    shape("line", { x1: px, x2: px, y1: 10, y2: 184 });
    found.forEach((point, i) => {
      shape("circle", { cx: point[0], cy: point[1], r: 4, class: dots[i] });
      outputs[i].textContent = point[3];
    });
    at.textContent = "step " + step.toLocaleString("en") + (epoch === null ? "" : ", epoch " + epoch);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.replaceChildren();
    outputs.forEach((output, i) => { output.textContent = lasts[i]; });
    at.textContent = last;
  });
}

// The map of a large confusion matrix tells the cell under the pointer.
for (const figure of document.querySelectorAll(".heat")) {
  const [names, flat] = data(figure);
  const counts = new Map();
  const videos = new Array(names.length).fill(0);
  for (let k = 0; k < flat.length; k += 3) {
    counts.set(flat[k] * names.length + flat[k + 1], flat[k + 2]);
    videos[flat[k]] += flat[k + 2];
  }
  const img = figure.querySelector("img");
  const at = figure.querySelector(".at");
  img.addEventListener("pointermove", (event) => {
    const box = img.getBoundingClientRect();
    const cell = (share) => Math.max(0, Math.min(names.length - 1, Math.floor(share * names.length)));
    const i = cell((event.clientY - box.top) / box.height);
    const j = cell((event.clientX - box.left) / box.width);
    const count = counts.get(i * names.length + j) || 0;
    at.textContent = names[i] + " → " + names[j] + ": " + count + " of " + videos[i];
  });
  img.addEventListener("pointerleave", () => { at.textContent = "\u00a0"; });
}

// The still of each clip stands in for its animation while paused.
for (const button of document.querySelectorAll(".pause")) {
  const sources = [...button.parentElement.querySelectorAll("picture source")];
  if (!sources.length) continue;
  let paused = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const show = () => { button.textContent = paused ? "Play" : "Pause"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    paused = !paused;
    for (const source of sources) source.media = paused ? "all" : "print";
    show();
  });
  show();
}
