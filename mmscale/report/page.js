// Near a dot of a map, show its image and caption, and find the same pair on every map.
"use strict";
(() => {
  const REACH = 9; // of a map's units
  const pairs = document.getElementById("pairs").content.children;
  const tip = document.getElementById("tip");
  const maps = [...document.querySelectorAll("svg.map")].map((svg) => ({
    svg,
    link: svg.querySelector("line"),
    dots: [...svg.querySelectorAll("circle")].map((mark) => ({
      mark,
      pair: Number(mark.dataset.pair),
      x: mark.cx.baseVal.value,
      y: mark.cy.baseVal.value,
    })),
  }));
  let shown = -1;

  const nearest = (map, event) => {
    const box = map.svg.getBoundingClientRect();
    const scale = map.svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const y = (event.clientY - box.top) * scale;
    let best = -1;
    let reach = REACH;
    for (const dot of map.dots) {
      const distance = Math.hypot(dot.x - x, dot.y - y);
      if (distance < reach) [reach, best] = [distance, dot.pair];
    }
    return best;
  };

  const mark = (pair) => {
    for (const map of maps) {
      const both = map.dots.filter((dot) => dot.pair === pair);
      for (const dot of map.dots) dot.mark.classList.toggle("on", dot.pair === pair);
      map.svg.classList.toggle("chosen", both.length === 2);
      if (both.length < 2) continue;
      const ends = { x1: both[0].x, y1: both[0].y, x2: both[1].x, y2: both[1].y };
      for (const name in ends) map.link.setAttribute(name, ends[name]);
    }
  };

  const show = (pair, event) => {
    if (pair !== shown) {
      shown = pair;
      mark(pair);
      tip.hidden = !pairs[pair];
      tip.replaceChildren(...(pairs[pair] ? [pairs[pair].cloneNode(true)] : []));
    }
    const room = 14;
    const left = Math.min(event.clientX + room, innerWidth - tip.offsetWidth - room);
    const below = event.clientY + room + tip.offsetHeight < innerHeight;
    tip.style.left = `${Math.max(room, left)}px`;
    tip.style.top = `${below ? event.clientY + room : event.clientY - tip.offsetHeight - room}px`;
  };

  for (const map of maps) {
    for (const kind of ["pointermove", "pointerdown"]) {
      map.svg.addEventListener(kind, (event) => show(nearest(map, event), event));
    }
  }
  document.addEventListener("pointerdown", (event) => {
    if (!event.target.closest("svg.map")) show(-1, event);
  });
  document.addEventListener("pointerover", (event) => {
    if (event.pointerType === "mouse" && !event.target.closest("svg.map")) show(-1, event);
  });
})();
