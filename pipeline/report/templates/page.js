"use strict";
document.documentElement.classList.add("js");

// Charts: the pointer or the arrow keys read one step's values.
for (const figure of document.querySelectorAll(".chart")) {
  const svg = figure.querySelector("svg");
  if (!svg) continue;
  const points = JSON.parse(svg.dataset.readout);
  const readout = figure.querySelector(".readout");
  const cursor = svg.querySelector(".cursor");
  const rest = Array.from(readout.childNodes);
  let at = points.length;
  const show = (index) => {
    at = Math.max(0, Math.min(points.length - 1, index));
    readout.textContent = points[at][1];
    figure.classList.add("reading");
    cursor.setAttribute("d", `M${points[at][0]} 12V166`);
  };
  const leave = () => {
    readout.replaceChildren(...rest);
    figure.classList.remove("reading");
    cursor.setAttribute("d", "");
  };
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * 400;
    let nearest = 0;
    points.forEach((point, index) => {
      if (Math.abs(point[0] - x) < Math.abs(points[nearest][0] - x)) nearest = index;
    });
    show(nearest);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    show(at + move);
  });
}

// Heat: a dark veil that is thin where the weight is high, so that the picture keeps its colours
// there, and a little amber where it is highest, so that it shows on dark pictures too.
const VEIL = [14, 20, 44];
const AMBER = [255, 186, 60];
const DARKEST = 0.76;
const tint = (level) => {
  const weight = level / 255;
  const dark = DARKEST * (1 - weight);
  const glow = 0.16 * weight * weight;
  const alpha = dark * (1 - glow) + glow;
  return [...VEIL.map((part, i) => (part * dark * (1 - glow) + AMBER[i] * glow) / alpha), alpha];
};
const rgba = ([red, green, blue, alpha]) => `rgba(${red}, ${green}, ${blue}, ${alpha})`;
const percent = (text) => {
  const value = 100 * Number(text);
  return value >= 10 ? value.toFixed(0) : value.toFixed(1);
};

class Picture {
  constructor(box) {
    this.data = box.dataset;
    this.box = box;
    this.canvas = box.querySelector("canvas");
    this.maps = Uint8Array.from(atob(this.data.maps), (letter) => letter.charCodeAt(0));
    this.peaks = this.data.peaks.split(",");
    this.shares = this.data.shares.split(",");
    this.boxes = this.data.boxes.split(",").map(Number);
    this.layers = Number(this.data.layers);
    this.tokens = Number(this.data.tokens);
    this.token = Number(this.data.token);
    this.layer = this.layers;
  }
  draw() {
    const layer = Math.min(this.layer, this.layers);
    const map = layer * this.tokens + this.token;
    const size = this.maps.length / this.peaks.length;
    const levels = this.maps.subarray(map * size, (map + 1) * size);
    if (this.data.grid) this.drawGrid(levels);
    else this.drawBoxes(levels);
    const looked = this.box.parentElement.querySelector(".looked");
    if (looked && looked.dataset.unit === "share") {
      looked.textContent =
        `${percent(this.shares[map])}% on the picture, peak ${percent(this.peaks[map])}%`;
    }
  }
  drawGrid(levels) {
    const [rows, columns] = this.data.grid.split(",").map(Number);
    this.canvas.width = columns;
    this.canvas.height = rows;
    this.place(...this.boxes);
    this.canvas.style.boxShadow = `0 0 0 2000px ${rgba(tint(0))}`; // where there is no cell
    const pen = this.canvas.getContext("2d");
    const pixels = pen.createImageData(columns, rows);
    levels.forEach((level, cell) => {
      const [red, green, blue, alpha] = tint(level);
      pixels.data.set([red, green, blue, 255 * alpha], 4 * cell);
    });
    pen.putImageData(pixels, 0, 0);
  }
  drawBoxes(levels) {
    const image = this.box.querySelector("img");
    const width = (this.canvas.width = 2 * image.getAttribute("width"));
    const height = (this.canvas.height = 2 * image.getAttribute("height"));
    this.place(0, 0, 1, 1);
    const pen = this.canvas.getContext("2d");
    const fill = (level, x1, y1, x2, y2) => {
      pen.clearRect(x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height);
      pen.fillStyle = rgba(tint(level));
      pen.fillRect(x1 * width, y1 * height, (x2 - x1) * width, (y2 - y1) * height);
    };
    fill(0, 0, 0, 1, 1);
    const order = Array.from(levels.keys()).sort((a, b) => levels[a] - levels[b]);
    for (const region of order) fill(levels[region], ...this.boxes.slice(4 * region, 4 * region + 4));
    pen.strokeStyle = "#ffd479";
    pen.lineWidth = 2;
    for (const region of order.slice(order.length - Number(this.data.outlined))) {
      const [x1, y1, x2, y2] = this.boxes.slice(4 * region, 4 * region + 4);
      pen.globalAlpha = Math.max(0.35, levels[region] / 255);
      pen.strokeRect(x1 * width + 1, y1 * height + 1, (x2 - x1) * width - 2, (y2 - y1) * height - 2);
    }
  }
  place(x1, y1, x2, y2) {
    Object.assign(this.canvas.style, {
      left: `${100 * x1}%`,
      top: `${100 * y1}%`,
      width: `${100 * (x2 - x1)}%`,
      height: `${100 * (y2 - y1)}%`,
    });
  }
}

const pictures = Array.from(document.querySelectorAll(".picture[data-maps]"), (box) => new Picture(box));
const redraw = () => pictures.forEach((picture) => picture.draw());
for (const picture of pictures) {
  const words = Array.from(picture.box.parentElement.querySelectorAll(".word"));
  const choose = (chosen) => {
    words.forEach((word, index) => word.setAttribute("aria-pressed", String(index === chosen)));
    picture.token = chosen;
    picture.draw();
  };
  words.forEach((word, index) => {
    for (const kind of ["pointerenter", "focus", "click"]) word.addEventListener(kind, () => choose(index));
  });
  if (words.length) choose(picture.token);
}
redraw();

// The same control may stand in several sections; they move together.
const together = (selector, field, apply) => {
  const controls = document.querySelectorAll(selector);
  for (const control of controls) {
    control.addEventListener("change", () => {
      for (const other of controls) other[field] = control[field];
      apply(control[field]);
    });
  }
};
together("select.layer", "value", (value) => {
  for (const picture of pictures) picture.layer = Number(value);
  redraw();
});
together("input.heat", "checked", (checked) => document.body.classList.toggle("still", !checked));
together("input.principal", "checked", (checked) => document.body.classList.toggle("principal", checked));

// Filters: only the examples that carry the chosen word in data-is.
for (const choices of document.querySelectorAll(".choices[data-filters]")) {
  const buttons = Array.from(choices.querySelectorAll("button"));
  const section = choices.closest("section");
  const apply = (chosen, open) => {
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen));
    const wanted = chosen.value;
    const all = Array.from(section.querySelectorAll("[data-is]"));
    for (const example of all) {
      example.hidden = Boolean(wanted) && !example.dataset.is.split(" ").includes(wanted);
    }
    section.querySelector(".nothing").hidden = all.some((example) => !example.hidden);
    for (const fold of section.querySelectorAll("details.more")) fold.open = fold.open || open;
  };
  for (const button of buttons) button.addEventListener("click", () => apply(button, Boolean(button.value)));
  apply(buttons[0], false);
}
