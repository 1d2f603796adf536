"use strict";
// Brings a report to life: read-outs, switches, thumbnails, and refreshes of a live one. Everything
// that it shows is in the page already; without it the figures stand still.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const chosen = { log: new Map(), off: new Map(), at: new Map() }; // outlives a refresh

  function make(name, properties, ...children) {
    const element = Object.assign(document.createElement(name), properties);
    element.append(...children);
    return element;
  }
  function draw(parent, name, attributes) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }
  function number(value) {
    const size = Math.abs(value);
    if (value !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: size >= 1e4 ? 6 : 4 });
  }
  function nearest(places, x) {
    let low = 0, high = places.length - 1;
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (places[middle] < x) low = middle; else high = middle;
    }
    return x - places[low] < places[high] - x ? low : high;
  }
  // Pointer position in the units of an SVG.
  function position(svg, event) {
    const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
    return [
      ((event.clientX - box.left) / box.width) * view.width,
      ((event.clientY - box.top) / box.height) * view.height,
    ];
  }
  function slider(id, count, name) {
    return make("input", {
      type: "range", id, min: 0, max: count - 1, value: Math.min(chosen.at.get(id) ?? count - 1, count - 1),
      ariaLabel: name,
    });
  }

  // --- curves ---------------------------------------------------------------------------------

  function chart(figure) {
    const { lines, unit } = JSON.parse(figure.dataset.points);
    const svg = figure.querySelector(".plot svg"), readout = figure.querySelector(".readout");
    const title = figure.querySelector("h3").textContent;
    const cursor = draw(svg, "g", { class: "cursor" });
    const longest = lines.reduce((a, b) => (b.x.at(-1) > a.x.at(-1) ? b : a));
    const control = slider(`${figure.id}-slider`, longest.x.length, `${title}: step to read`);

    function visible() {
      return lines.filter((l) => !figure.querySelector(`.plot [data-series="${l.key}"]`).classList.contains("off"));
    }
    function show(x) {
      cursor.replaceChildren();
      const parts = [], scale = figure.classList.contains("log") ? "log" : "linear";
      draw(cursor, "path", { d: `M${x} 10V180` });
      for (const line of visible()) {
        const at = nearest(line.x, x), y = line[scale][at];
        if (y != null) draw(cursor, "circle", { class: `c${line.key % 8}`, cx: line.x[at], cy: y, r: 3.5 });
        parts.push(`${lines.length > 1 ? line.name + " " : ""}${number(line.values[at])}`);
      }
      const step = longest.steps[nearest(longest.x, x)].toLocaleString("en");
      const text = `step ${step}: ${parts.join(" · ")}${unit ? " " + unit : ""}`;
      readout.textContent = text;
      control.ariaValueText = text;
    }
    function hide() {
      cursor.replaceChildren();
      readout.textContent = "";
    }
    function read() {
      chosen.at.set(control.id, +control.value);
      show(longest.x[+control.value]);
    }
    const plot = figure.querySelector(".plot");
    plot.addEventListener("pointermove", (event) => {
      const [x] = position(svg, event);
      control.value = nearest(longest.x, x);
      show(longest.x[+control.value]);
    });
    plot.addEventListener("pointerleave", () => (document.activeElement === control ? read() : hide()));
    control.addEventListener("input", read);
    control.addEventListener("focus", read);
    control.addEventListener("blur", hide);
    plot.after(control);

    if ("log" in figure.dataset) {
      const button = make("button", {
        type: "button", id: `${figure.id}-log`, className: "switch", ariaLabel: `${title}: logarithmic scale`,
      }, "log");
      const set = (log) => {
        chosen.log.set(figure.id, log);
        figure.classList.toggle("log", log);
        button.ariaPressed = String(log);
      };
      button.addEventListener("click", () => set(button.ariaPressed !== "true"));
      figure.querySelector("h3").after(button);
      set(chosen.log.get(figure.id) ?? false);
    }
  }

  function legend(list) {
    const scope = list.closest(list.dataset.scope);
    for (const span of list.querySelectorAll("[data-toggle]")) {
      const key = span.dataset.toggle, id = `${scope.id || list.closest("section").id}-toggle-${key}`;
      const button = make("button", { type: "button", id, className: "switch" }, ...span.childNodes);
      const set = (off) => {
        chosen.off.set(id, off);
        button.ariaPressed = String(!off);
        for (const line of scope.querySelectorAll(`[data-series="${key}"]`)) line.classList.toggle("off", off);
      };
      button.addEventListener("click", () => set(button.ariaPressed === "true"));
      span.replaceWith(button);
      set(chosen.off.get(id) ?? false);
    }
  }

  // --- the map --------------------------------------------------------------------------------

  function embedding(root) {
    const { columns, side, texts, points } = JSON.parse(root.dataset.facts);
    const plots = [...root.querySelectorAll(".map .plot")], image = root.querySelector(".sheet");
    const canvas = make("canvas", { width: side, height: side });
    const words = make("div");
    const thumbnail = make("div", { className: "thumbnail", hidden: true, ariaHidden: "true" }, canvas, words);
    const control = slider(`${root.id}-slider`, texts.length, "Image on the map");
    const label = make("p", { className: "hint help" }, "Point at the map, or move the slider with the arrow keys, to see the images.");
    const spots = plots.map((plot) => draw(plot.firstElementChild, "g", { class: "spot" }));

    function show(index, map) {
      spots.forEach((spot, number) => {
        const [cx, cy] = points[number][index];
        spot.replaceChildren();
        draw(spot, "circle", { cx, cy, r: 8 });
      });
      const place = canvas.getContext("2d");
      place.drawImage(image, (index % columns) * side, Math.floor(index / columns) * side, side, side, 0, 0, side, side);
      words.textContent = texts[index];
      control.ariaValueText = texts[index];
      thumbnail.hidden = false;
      const box = plots[map].getBoundingClientRect(), around = root.getBoundingClientRect();
      const [x, y] = points[map][index].map((part) => (part / 360) * box.width);
      const left = box.left - around.left + x + 14, top = box.top - around.top + y + 14;
      thumbnail.style.left = `${Math.min(left, root.clientWidth - thumbnail.offsetWidth)}px`;
      thumbnail.style.top = `${top}px`;
    }
    function hide() {
      thumbnail.hidden = true;
      spots.forEach((spot) => spot.replaceChildren());
    }
    const last = plots.length - 1; // the encoder's
    function read() {
      chosen.at.set(control.id, +control.value);
      show(+control.value, last);
    }
    plots.forEach((plot, map) => {
      plot.addEventListener("pointermove", (event) => {
        const [x, y] = position(plot.firstElementChild, event);
        let best = 0, least = Infinity;
        points[map].forEach(([px, py], index) => {
          const distance = (px - x) ** 2 + (py - y) ** 2;
          if (distance < least) [best, least] = [index, distance];
        });
        if (least > 400) return hide();
        control.value = best;
        show(best, map);
      });
      plot.addEventListener("pointerleave", () => (document.activeElement === control ? read() : hide()));
    });
    control.addEventListener("input", read);
    control.addEventListener("focus", read);
    control.addEventListener("blur", hide);
    document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
    root.querySelector(".maps").after(label, control);
    root.append(thumbnail);
  }

  function enliven(root) {
    root.querySelectorAll("figure[data-points]").forEach(chart);
    root.querySelectorAll(".legend[data-scope]").forEach(legend);
    root.querySelectorAll(".embedding").forEach(embedding);
  }

  // --- a live page ----------------------------------------------------------------------------

  // Puts a newer page's parts in the place of those that changed, under the reader's eyes.
  function replace(page) {
    const parts = () => [...document.querySelectorAll("[data-part]")];
    // What the reader looks at: where the focus is, else the first thing in sight that has a name.
    const top = (element) => element.getBoundingClientRect().top;
    const anchor = [document.activeElement, ...document.querySelectorAll("main [id]")]
      .find((each) => each.id && top(each) >= 0 && top(each) < innerHeight);
    const before = anchor && top(anchor), focused = document.activeElement?.id;
    const fresh = [...page.querySelectorAll("[data-part]")];
    let previous = null;
    for (const part of fresh) {
      let old = document.getElementById(part.id);
      if (!old) {
        previous.after(document.adoptNode(part));
        enliven(old = part);
      } else if (old.dataset.part !== part.dataset.part) {
        const open = [...old.querySelectorAll("details")].map((each) => each.open);
        old.replaceWith(document.adoptNode(part));
        part.querySelectorAll("details").forEach((each, index) => (each.open = open[index] ?? false));
        enliven(old = part);
      }
      previous = old;
    }
    const kept = new Set(fresh.map((part) => part.id));
    parts().filter((part) => !kept.has(part.id)).forEach((part) => part.remove());
    document.title = page.title;
    if (focused && document.activeElement?.id !== focused) document.getElementById(focused)?.focus({ preventScroll: true });
    const same = anchor && document.getElementById(anchor.id);
    if (same) scrollBy({ top: top(same) - before, behavior: "instant" });
  }

  const seconds = Number(document.body.dataset.live || 0);
  let version = "";
  async function refresh() {
    const status = document.querySelector(".live");
    try {
      const reply = await fetch(location.pathname, { headers: { "If-None-Match": version } });
      if (reply.status === 200) {
        const page = new DOMParser().parseFromString(await reply.text(), "text/html");
        replace(page);
        version = reply.headers.get("ETag");
      } else if (reply.status !== 304) throw new Error(String(reply.status));
      status.textContent = "Live: this page follows the run.";
    } catch {
      status.textContent = "The server has ended: this is what it showed last.";
    }
    setTimeout(refresh, 1000 * seconds);
  }

  enliven(document);
  if (seconds) setTimeout(refresh, 1000 * seconds);
})();
